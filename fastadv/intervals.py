"""Interval bounds: between what values a feed-forward network's outputs lie, wherever in a box its inputs are.

    lower, upper = fastadv.intervals.interval_bounds(model, x - eps, x + eps)
    worst = fastadv.intervals.worst_logits(model, x, y, eps)  # no attack of this linf radius gets beyond it

Each layer maps a box to a box that holds all its outputs: an affine one by centre and radius, ``W c + b`` and ``|W| r``, a
monotone one by its ends. Boxes forget how outputs depend on each other, so bounds grow loose with depth: a network whose bounds
are to be of use is trained for them (:class:`fastadv.IBP`).

The bounds hold for the network in exact arithmetic. Computed, they are rounded like the network itself, to nearest and not
outwards: in fp32 some 1e-6 of the numbers that add up, in fp64 some 1e-15. A gap of that size proves nothing; for proofs use
fp64 (``model.double()``, ``x.double()``) and read the gaps.

Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .engine import Model, unwrap
from .normalize import Normalize
from .reference.step import Scalar, per_sample

Box: TypeAlias = tuple[Tensor, Tensor]  # lower and upper ends


def interval_bounds(model: Model, lower: Tensor, upper: Tensor) -> Box:
    """Bounds ``(lower, upper)`` of the outputs, each shaped like ``model(x)``, for all x with ``lower <= x <= upper``.

    Differentiable in the weights and in the ends. The network is read as it is in eval mode, whatever mode it is in: dropout
    does nothing, batch norms use their running statistics.

    Args:
        model: a layer of :data:`RULES`, or an nn.Sequential, nested or not, of such: linear and convolutional ones, batch
            norms, monotone activations, max and average pooling, Flatten, Dropout, Identity, :class:`fastadv.Normalize`.
            DistributedDataParallel and torch.compile are looked through.
        lower, upper: [N, ...], of one shape.

    Raises:
        ValueError: the model holds another layer (its name is told), or lower is above upper somewhere.
    """
    if lower.shape != upper.shape or not lower.is_floating_point() or not bool((lower <= upper).all()):
        raise ValueError(
            "lower and upper must be floating tensors of one shape with lower <= upper everywhere; "
            f"got {checks.describe(lower)} and {checks.describe(upper)}"
        )
    return _through(_layers(model), lower, upper)


def worst_logits(model: Model, x: Tensor, y: Tensor, eps: Scalar, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:
    """Upper bounds [N, C] of ``z_j - z_y`` over the linf ball of radius eps round x and the box; 0 at y itself.

    Where all others are below 0, no image in the ball is misclassified. Cross-entropy of them bounds that of every image in the
    ball. The last linear layer takes part through ``W_j - W_y`` ("elision of the last layer"), which is tighter than the
    difference of two logits' bounds; of a network that ends otherwise they are that difference. Holds N x C x features numbers.

    Args:
        model: as :func:`interval_bounds`, with logits [N, C].
        x: images [N, ...]. y: labels [N], integer. Their values are not looked at: nothing waits for the device.
        eps: radius in units of x, float or [N].
        bounds: (lo, hi) of every element, or None.

    Raises:
        ValueError: the model holds an unknown layer, or an argument is not as described.
    """
    lo, hi = checks.bounds(bounds)
    checks.non_negative("eps", eps)
    checks.per_sample("eps", eps, x)
    checks.labels(y, x)
    if y.is_floating_point():
        raise ValueError(f"y must be integer labels [{len(x)}]; got soft labels {list(y.shape)}")
    layers, y, x = _layers(model), y.long(), x.detach()
    last: Any = layers.pop()[1] if layers and type(layers[-1][1]) is nn.Linear else None
    radius = per_sample(eps, x)
    middle, reach = _centred(_through(layers, (x - radius).clamp(lo, hi), (x + radius).clamp(lo, hi)))
    if middle.dim() != 2:
        raise ValueError(f"logits must be [N, C]: the last linear layer must see [N, features]; got {list(middle.shape)}")
    weight = torch.eye(middle.shape[1]).to(middle) if last is None else last.weight
    apart = weight - weight[y][:, None]  # [N, C, features]: W_j - W_y
    worst = (apart @ middle[..., None] + apart.abs() @ reach[..., None])[..., 0]
    return worst if last is None or last.bias is None else worst + (last.bias - last.bias[y][:, None])


# ---------------------------------------------------------------------------------------------------- layer by layer


def _layers(model: Model) -> list[tuple[str, nn.Module]]:
    """The model's layers by name, in the order in which they run."""
    while (inner := getattr(unwrap(model), "_orig_mod", unwrap(model))) is not model:  # of torch.compile, of DDP
        model = inner
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, whose layers can be read; got {type(model).__name__}")
    return list(_opened("model", model))


def _opened(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"{name}: interval bounds do not see what its forward hooks, or a forward put in place of its own, do")
    if type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    for child, layer in module._modules.items():  # and not named_children, which shows a module that is there twice once
        if layer is not None:
            yield from _opened(f"{name}.{child}", layer)


def _through(layers: list[tuple[str, nn.Module]], lower: Tensor, upper: Tensor) -> Box:
    for name, layer in layers:
        rule = RULES.get(type(layer))  # not those of its base classes: it may compute something else
        if rule is None:
            raise ValueError(
                f"{name}: interval bounds know no {type(layer).__name__}; known are nn.Sequential and "
                f"{', '.join(sorted(known.__name__ for known in RULES))}. For other networks there is auto_LiRPA: "
                "fastadv.certify.certify_intervals(..., method='crown')"
            )
        try:
            lower, upper = rule(layer, lower, upper)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return lower, upper


def _centred(box: Box) -> Box:
    """Centre and radius."""
    lower, upper = box
    return (lower + upper) / 2, (upper - lower) / 2


def _linear(layer: Any, lower: Tensor, upper: Tensor) -> Box:
    centre, radius = _centred((lower, upper))
    middle, reach = F.linear(centre, layer.weight, layer.bias), F.linear(radius, layer.weight.abs())
    return middle - reach, middle + reach


def _convolution(layer: Any, lower: Tensor, upper: Tensor) -> Box:
    centre, radius = _centred((lower, upper))
    middle = layer._conv_forward(centre, layer.weight, layer.bias)  # which pads as the layer does
    reach = layer._conv_forward(radius, layer.weight.abs(), None)
    return middle - reach, middle + reach


def _batch_norm(layer: Any, lower: Tensor, upper: Tensor) -> Box:
    if layer.running_mean is None:
        raise ValueError("a batch norm without running statistics lets images depend on each other")
    one, other = (
        F.batch_norm(end, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        for end in (lower, upper)
    )
    return torch.minimum(one, other), torch.maximum(one, other)  # a negative weight turns an interval round


def _monotone(layer: Any, lower: Tensor, upper: Tensor) -> Box:
    signs = (getattr(layer, name, None) or 1 for name in ("negative_slope", "alpha", "divisor_override"))
    if min(signs) < 0 or getattr(layer, "return_indices", False):
        raise ValueError(f"{layer} is no monotone map of numbers")
    if getattr(layer, "inplace", False):
        lower, upper = lower.clone(), upper.clone()
    return layer(lower), layer(upper)


def _unchanged(layer: Any, lower: Tensor, upper: Tensor) -> Box:
    return lower, upper


RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Box]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Hardtanh, nn.Sigmoid, nn.Tanh), _monotone),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d), _monotone),
    **dict.fromkeys((nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d), _monotone),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.ZeroPad2d, Normalize), _monotone),  # whose std is positive
    **dict.fromkeys((nn.Dropout, nn.Dropout2d, nn.Identity), _unchanged),
}
