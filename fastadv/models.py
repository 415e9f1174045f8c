"""Networks by name, as the papers on adversarial training define them.

    model = fastadv.models.build("wide-resnet", depth=34)
    model = fastadv.models.build("preact-resnet18", classes=100, mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276))
    model = fastadv.models.build("wide-resnet", activation="silu", bn_momentum=0.01, padding="asymmetric")  # DM-Improves-AT

| Name | Network | Images | Arguments |
|---|---|---|---|
| small-cnn | SmallCNN of TRADES: four convolutions, three linear layers, 0.31M parameters | 1x28x28 | dropout |
| madry-cnn | of Madry et al. for MNIST: two convolutions, two linear layers, 3.3M | 1x28x28 | |
| demo-cnn | of ``fastadv demo``, which trains in a minute: 0.17M | 1x28x28 | |
| preact-resnet18 | of Fast AT, Rice et al., AWP and SCORE: 11.2M | 3x32x32 | |
| wide-resnet | WRN-28-10: 36.5M; WRN-34-10: 46.2M; WRN-70-16: 267M | 3x32x32 | depth, widen, activation, bn_momentum, padding |
| timm:NAME | ``timm.create_model(NAME, num_classes=classes, ...)``, of the package timm | | those of timm |
| package.module:function | your own: ``function(...)``, with ``classes`` where it has such a parameter | | its own |

All but the last two can end in a method's own layer instead of a linear one: ``head="hypersphere"`` or ``head="mmc"``.

A checkpoint ``{"model": "fastadv.models:build", "arguments": {"name": "wide-resnet", "depth": 34}, "state_dict": ...}`` is one
that ``fastadv evaluate`` loads by itself.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .normalize import Normalize
from .objectives.hypersphere import HypersphereHead
from .objectives.mmc import MMCHead

Head = Callable[[int, int], nn.Module]  # a network's last layer, from its features and classes

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}  # SiLU is the Swish of papers
PADDINGS = ("symmetric", "asymmetric")


# ------------------------------------------------------------------------------------------------------ networks for digits


def small_cnn(classes: int = 10, head: Head = nn.Linear, dropout: float = 0.5) -> nn.Sequential:
    """SmallCNN for 1x28x28, on which TRADES and its successors report MNIST.

    Convolutions start He normal, their biases and the last linear layer at zero: before the first step all logits are
    equal, and the gradient of an attack is zero. ``dropout`` stands after the first linear layer.

    Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", 2019; after Carlini and Wagner, 2017.
    """
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 4 * 4, 200), nn.ReLU(), nn.Dropout(dropout), nn.Linear(200, 200), nn.ReLU(), head(200, classes),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            _zero(layer.bias)
    if isinstance(last := net[-1], nn.Linear):
        _zero(last.weight)
        _zero(last.bias)
    return net


def madry_cnn(classes: int = 10, head: Head = nn.Linear) -> nn.Sequential:
    """The network for 1x28x28 of the MNIST challenge: weights start normal (0.1, cut off at 0.2), biases at 0.1.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018.
    """
    net = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 7 * 7, 1024), nn.ReLU(), head(1024, classes),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, 0.1)
    return net


def demo_cnn(classes: int = 10, head: Head = nn.Linear) -> nn.Sequential:
    """:func:`fastadv.demo.small_cnn`, for 1x28x28, with the seed that torch has."""
    from . import demo  # it imports much, and stands above this file

    return demo.small_cnn(torch.initial_seed(), lambda: head(100, classes))


# -------------------------------------------------------------------------------------------- residual networks for 3x32x32


class PreActBlock(nn.Module):
    """BN-activation-conv twice, plus the input; the shortcut of a block that changes shape starts after the first activation.

    Args:
        channels, width: of its input and output. stride: 1 or 2, of its first convolution and of its shortcut.
        activation, bn_momentum, padding: as :func:`wide_resnet`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        activation: str = "relu",
        bn_momentum: float = 0.1,
        padding: str = "symmetric",
    ) -> None:
        super().__init__()
        # Where there is but one row and one column of zeros to add, TensorFlow's SAME adds them at the bottom and the right.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if padding == "asymmetric" and stride == 2 else None
        self.act = ACTIVATIONS[activation]()
        self.bn1, self.bn2 = (nn.BatchNorm2d(c, momentum=bn_momentum) for c in (channels, width))
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=0 if self.pad else 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes_shape = stride != 1 or channels != width
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(a)
        padded = a if self.pad is None else self.pad(a)
        return self.conv2(self.act(self.bn2(self.conv1(padded)))) + skip  # type: ignore[no-any-return]


def preact_resnet18(classes: int = 10, head: Head = nn.Linear) -> nn.Sequential:
    """PreActResNet-18 for 3x32x32, with a last batch norm and ReLU, as adversarial training uses it.

    It starts as torch's layers do, which is what those papers train.

    He et al., "Identity Mappings in Deep Residual Networks", 2016; Wong et al., 2020; Rice et al., 2020.
    """
    return _preact(64, ((64, 1), (128, 2), (256, 2), (512, 2)), 2, 4, classes, head)


def wide_resnet(
    depth: int = 28,
    widen: int = 10,
    classes: int = 10,
    head: Head = nn.Linear,
    activation: str = "relu",
    bn_momentum: float = 0.1,
    padding: str = "symmetric",
) -> nn.Sequential:
    """WRN-depth-widen for 3x32x32: three groups of (depth - 4) / 6 :class:`PreActBlock`, 16 to 64 widen channels, no dropout.

    Convolutions start He normal by their fan-out, the last linear layer's bias at zero. The defaults are the network of
    TRADES, Rice et al., AWP and RST; without the second, unused first group that TRADES' own code has.

    Gowal et al., 2020, and those after them, DM-Improves-AT among them, train ``activation="silu", bn_momentum=0.01,
    padding="asymmetric"``, and normalise inside. (Their training loop has another part in it: the first update of the
    running statistics has momentum 1, so that these begin at the first batch's.)

    Args:
        depth: 6n + 4: 28, 34, 70, ... widen: how many times the 16, 32 and 64 channels.
        activation: "relu" or "silu" (Swish).
        bn_momentum: in (0, 1]: the share of a batch in the new running statistics.
        padding: of the 3x3 convolutions with stride 2: "symmetric", zeros on all four sides, or "asymmetric", at the bottom
            and the right only, as TensorFlow and JAX pad. The same number of operations.

    Zagoruyko and Komodakis, "Wide Residual Networks", 2016; Gowal et al., "Uncovering the Limits of Adversarial Training
    against Norm-Bounded Adversarial Examples", 2020; Wang et al., "Better Diffusion Models Further Improve Adversarial
    Training", 2023.
    """
    if checks.integer("depth", depth, 10) % 6 != 4:
        raise ValueError(f"depth must be 6n + 4, as 28, 34 and 70 are; got {depth}")
    checks.integer("widen", widen)
    checks.one_of("activation", activation, ACTIVATIONS)
    checks.one_of("padding", padding, PADDINGS)
    if checks.number("bn_momentum", bn_momentum, positive=True) > 1:
        raise ValueError(f"bn_momentum must be in (0, 1]; got {bn_momentum!r}")
    groups = ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2))
    net = _preact(
        16, groups, (depth - 4) // 6, 8, classes, head, activation=activation, bn_momentum=bn_momentum, padding=padding
    )
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(net.head, nn.Linear):
        _zero(net.head.bias)
    return net


def _preact(
    stem: int,
    groups: tuple[tuple[int, int], ...],
    depth: int,
    pool: int,
    classes: int,
    head: Head,
    activation: str = "relu",
    bn_momentum: float = 0.1,
    padding: str = "symmetric",
) -> nn.Sequential:
    """Groups of ``depth`` blocks, each group with its width and the stride of its first block, between a stem and a head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(3, stem, 3, padding=1, bias=False))
    channels = stem
    for g, (width, first_stride) in enumerate(groups, 1):
        for b in range(1, depth + 1):
            stride = first_stride if b == 1 else 1
            layers[f"block{g}_{b}"] = PreActBlock(channels, width, stride, activation, bn_momentum, padding)
            channels = width
    layers["norm"], layers["act"] = nn.BatchNorm2d(channels, momentum=bn_momentum), ACTIVATIONS[activation]()
    layers["pool"], layers["flatten"] = nn.AvgPool2d(pool), nn.Flatten()
    layers["head"] = head(channels, classes)
    return nn.Sequential(layers)


def _zero(tensor: Tensor | None) -> None:
    if tensor is not None:
        nn.init.zeros_(tensor)


# --------------------------------------------------------------------------------------------------------------- by name

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": small_cnn,
    "madry-cnn": madry_cnn,
    "demo-cnn": demo_cnn,
    "preact-resnet18": preact_resnet18,
    "wide-resnet": wide_resnet,
}
HEADS: dict[str, Callable[..., nn.Module]] = {"linear": nn.Linear, "hypersphere": HypersphereHead, "mmc": MMCHead}
HEAD_ARGUMENTS = {"linear": (), "hypersphere": ("scale",), "mmc": ("dimensions", "norm")}
ELSEWHERE = "timm:NAME or package.module:function"


def build(
    name: str,
    classes: int = 10,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    seed: int = 0,
    head: str | None = None,
    **arguments: Any,
) -> nn.Module:
    """A network by name, on the CPU (or on the device "meta", if that is torch's default), in training mode.

    The same arguments make the same weights, whatever device they will be on. Torch's global random state is left as it was.

    Args:
        name: one of :data:`MODELS`, "timm:NAME" or "package.module:function". The latter runs code: name none that you do
            not trust. It is called with ``arguments``, and with ``classes`` if it has a parameter of that name.
        classes: of the logits [N, classes].
        mean, std: given both, a number or one a channel: ``nn.Sequential(fastadv.Normalize(mean, std), network)``.
        seed: of the initial weights.
        head: the last layer: "linear" (the default); "hypersphere", a :class:`fastadv.HypersphereHead`, which takes scale;
            or "mmc", a :class:`fastadv.MMCHead`, which takes dimensions and norm. A network from elsewhere keeps its own.
        arguments: of the network and of its head.

    Raises:
        ValueError: something is unknown or out of range, or the package that has the network is missing.
    """
    checks.integer("classes", classes, 2)
    checks.integer("seed", seed, 0)
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given both or neither; got mean={mean!r}, std={std!r}")
    with torch.device("cpu"):  # it looks at its numbers, which "meta" does not have
        normalize = None if mean is None or std is None else Normalize(mean, std)
    make = _maker(name, classes, head, arguments)
    with _drawing_by(seed):
        network = make()
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module; got {type(network).__name__}")
    return network if normalize is None else nn.Sequential(normalize, network)


def _maker(name: str, classes: int, head: str | None, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    """What makes the network, all names in it known."""
    if not isinstance(name, str) or (name not in MODELS and ":" not in name):
        raise ValueError(f"name must be one of {', '.join(MODELS)}, or {ELSEWHERE}; got {name!r}{checks.nearest(name, MODELS)}")
    if name in MODELS:
        head = "linear" if head is None else head
        checks.one_of("head", head, HEADS)
        of_network = _keywords(MODELS[name]) - {"classes", "head"}
        of_head = HEAD_ARGUMENTS[head]
        _check_known(name, arguments, [*sorted(of_network), *of_head])
        last = partial(HEADS[head], **{k: v for k, v in arguments.items() if k in of_head})
        return partial(MODELS[name], classes=classes, head=last, **{k: v for k, v in arguments.items() if k in of_network})
    if head is not None:
        raise ValueError(f"head must be None for {name}, which has a last layer of its own; got {head!r}")
    if name.startswith("timm:"):
        return partial(_of_timm, name.removeprefix("timm:"), classes, arguments)
    function = _imported(name)
    known = _keywords(function)
    if "classes" in known:
        arguments = {"classes": classes, **arguments}
    if "**" not in known:
        _check_known(name, arguments, sorted(known))
    return partial(function, **arguments)


def _of_timm(name: str, classes: int, arguments: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm:{name} needs the package timm ({error}): pip install timm") from None
    try:
        return timm.create_model(name, num_classes=classes, **arguments)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError, ValueError) as error:
        near = checks.nearest(name, timm.list_models()) if "Unknown model" in str(error) else ""
        raise ValueError(f"timm:{name} cannot be built: {error}{near}") from error


def _imported(name: str) -> Callable[..., nn.Module]:
    module, _, function = name.partition(":")
    try:
        found = attrgetter(function)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{name} must be a function that returns a torch.nn.Module; got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _keywords(function: Callable[..., Any]) -> set[str]:
    """What it can be called with by name, "**" being anything."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of some that are written in C
        return {"**"}
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named | {"**" for p in parameters if p.kind is p.VAR_KEYWORD}


def _check_known(model: str, arguments: Collection[str], known: Collection[str]) -> None:
    for argument in arguments:
        if argument not in known:
            takes = ", ".join(known) or "none"
            raise ValueError(f"{model} has no argument {argument!r}{checks.nearest(argument, known)} (its arguments: {takes})")


@contextlib.contextmanager
def _drawing_by(seed: int) -> Iterator[None]:
    """Torch's layers start by ``seed``, wherever they will go: the CPU's generator draws for all of them."""
    device = "meta" if torch.empty(0).is_meta else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too, and they are not restored
        yield


# ------------------------------------------------------------------------------------------------------------------ cost


def forward_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """F: floating-point operations of one forward of one sample, a multiply-add being two, as torch's FlopCounterMode counts.

    Convolutions, matrix products and attention count; what is elementwise does not. Nothing is computed, and nothing but
    the model's structure is copied. A gradient by the input alone costs another F, one by input and weights another 2F.

    Args:
        model: maps [1, *shape] to logits; it is left as it is, and counted in eval mode. shape: of a sample, as (3, 32, 32).
    """
    from torch.utils.flop_counter import FlopCounterMode

    on_meta: dict[int, Any] = {}  # of each tensor of the model, what a copy of it has instead
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        on_meta[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    hollow = copy.deepcopy(model, on_meta).eval()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        hollow(torch.empty(1, *shape, dtype=next((p.dtype for p in model.parameters()), None)))
    return int(counter.get_total_flops())
