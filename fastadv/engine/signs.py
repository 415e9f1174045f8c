"""Forward passes that keep, for an input gradient, what it needs: weights and signs in place of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

Numbers = int | Sequence[int]


def signs_only() -> TorchFunctionMode:
    """A context for the forward of a model whose parameters take no gradient: autograd saves several times less, exactly.

    Outputs, input gradients and their memory formats are those of plain autograd, bit for bit: torch's own kernels compute
    them. What autograd saves meanwhile:

    - conv1d, conv2d, conv3d: the weight; usually that and the input, under autocast casts of both;
    - batch_norm by running statistics: these and the weight; usually the input as well;
    - relu, relu6, hardtanh, leaky_relu, in place or not: a bool an element; usually the output or the input;
    - max_pool2d: indices of 16 bits (32 in images of more than 2^15 pixels); usually the input and indices of 64.

    Everything else saves what it always does: linear layers, which need their weight alone, as well as smooth activations,
    average pools and attention, which need more. So do the above where weights want gradients too, for subclasses of Tensor,
    within transforms of torch.func (vmap) and under torch.compile.

    The backward may run outside. A second derivative raises, and so does torch.utils.checkpoint in the model. Under autocast
    the gradients of an image that several convolutions read are summed in the image's precision, not in the lower one.
    """
    return _SignsOnly()


class _SignsOnly(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LEAN and args and _recorded(args[0]):
            output = _LEAN[func](func, *args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)


def _recorded(x: Any) -> bool:
    """Whether autograd, and nothing else, will record what is done to ``x``."""
    return (
        torch.is_grad_enabled()
        and _plain(x)
        and x.requires_grad
        and x.numel() > 0  # else there is nothing to save, and torch's own batch_norm takes another way
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.is_floating_point()


def _frozen(*weights: Tensor | None) -> bool:
    return all(w is None or (_plain(w) and not w.requires_grad) for w in weights)


class _Lean(torch.autograd.Function):
    """``*saved, output = run()``, a function of x whose input gradient is ``gradient(grad, *saved)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[], tuple[Any, ...]], gradient: Callable[..., Tensor]) -> Tensor:
        *saved, output = run()
        if output is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(*saved)
        ctx.gradient = gradient
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(grad, *ctx.saved_tensors), None, None


def _lean(x: Tensor, run: Callable[[], tuple[Any, ...]], gradient: Callable[..., Tensor]) -> Tensor:
    return _Lean.apply(x, run, gradient)  # type: ignore[no-any-return,no-untyped-call]


def _stand_in(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What to give in place of ``x`` to a backward kernel that uses its shape and strides alone: any tensor that has them."""
    shape, strides = x.shape, x.stride()

    def like_x(grad: Tensor) -> Tensor:
        return grad if (grad.shape, grad.stride()) == (shape, strides) else grad.new_empty_strided(shape, strides)

    return like_x


# ------------------------------------------------------------------------------------------------------ the operations


def _conv(
    func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Numbers = 1, padding: str | Numbers = 0, dilation: Numbers = 1, groups: int = 1,
) -> Tensor | None:  # fmt: skip
    if not _frozen(weight, bias) or x.dim() != weight.dim():  # an image without a batch
        return None
    dims = x.dim() - 2
    pads: Any = padding
    if padding == "valid":
        pads = 0
    elif padding == "same":
        twice = [d * (k - 1) for d, k in zip(_list(dilation, dims), weight.shape[2:], strict=False)]
        if any(p % 2 for p in twice):  # one side gets more than the other
            return None
        pads = [p // 2 for p in twice]
    geometry = (_list(stride, dims), _list(pads, dims), _list(dilation, dims), False, [0] * dims, groups)
    like_x = _stand_in(x)

    def gradient(grad: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(grad.dtype)  # as autocast did
        dx, _, _ = aten.convolution_backward(grad, like_x(grad), weight, None, *geometry, [True, False, False])
        return dx  # type: ignore[no-any-return]

    def run() -> tuple[Any, ...]:  # detached: autocast keeps casts of leaves for later use, in older torch without their graph
        return weight, func(x.detach(), weight, bias, stride, padding, dilation, groups)

    return _lean(x, run, gradient)


def _batch_norm(
    func: Any, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    if training or running_mean is None or not _frozen(running_mean, running_var, weight, bias):
        return None
    like_x = _stand_in(x)

    def run() -> tuple[Any, ...]:
        return running_mean, running_var, weight, func(x, running_mean, running_var, weight, bias, False, momentum, eps)

    def gradient(grad: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None) -> Tensor:
        none = mean.new_empty(0)  # of the batch's own statistics
        dx, _, _ = aten.native_batch_norm_backward(
            grad, like_x(grad), weight, mean, var, none, none, False, eps, [True, False, False]
        )
        return dx  # type: ignore[no-any-return]

    return _lean(x, run, gradient)


def _max_pool2d(
    func: Any, x: Tensor, kernel_size: Numbers, stride: Numbers | None = None,
    padding: Numbers = 0, dilation: Numbers = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor:  # fmt: skip
    # Where indices are asked for, torch calls another function: they are not.
    window = (kernel_size, stride or [], padding, dilation, ceil_mode)
    small = torch.int16 if x.shape[-2] * x.shape[-1] <= 2**15 else torch.int32
    like_x = _stand_in(x)

    def run() -> tuple[Any, ...]:
        output, indices = aten.max_pool2d_with_indices(x, *window)
        return indices.to(small), output

    def gradient(grad: Tensor, indices: Tensor) -> Tensor:
        return aten.max_pool2d_with_indices_backward(grad, like_x(grad), *window, indices.long())  # type: ignore[no-any-return]

    return _lean(x, run, gradient)


# Gates go to torch's backward kernels as 0 and 1, in place of numbers of either sign. It reads bytes faster than bools.


def _relu(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    def run() -> tuple[Tensor, Tensor]:
        output = func(x, *args, **kwargs)
        return output.bool(), output  # a NaN is open

    return _lean(x, run, _gate)


def _relu6(func: Any, x: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(F.hardtanh, x, 0.0, 6.0, inplace)


def _hardtanh(func: Any, x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    def run() -> tuple[Tensor, Tensor]:  # torch's kernel itself says where it is open: it varies for NaN and rounded bounds
        is_open = aten.hardtanh_backward(torch.ones_like(x), x, min_val, max_val).bool()
        return is_open, func(x, min_val, max_val, inplace)

    return _lean(x, run, _gate)


def _gate(grad: Tensor, is_open: Tensor) -> Tensor:
    return aten.threshold_backward(grad, is_open.view(torch.uint8), 0)  # type: ignore[no-any-return]


def _leaky_relu(func: Any, x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor | None:
    if negative_slope < 0:  # the result in place does not tell the sign; torch refuses it
        return None

    def gradient(grad: Tensor, positive: Tensor) -> Tensor:
        return aten.leaky_relu_backward(grad, positive.view(torch.uint8), negative_slope, False)  # type: ignore[no-any-return]

    return _lean(x, lambda: (x > 0, func(x, negative_slope, inplace)), gradient)


def _list(value: Numbers, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)


_LEAN: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], _conv),
    F.batch_norm: _batch_norm,
    **dict.fromkeys([F.max_pool2d, torch.max_pool2d], _max_pool2d),
    **dict.fromkeys([F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_], _relu),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.leaky_relu: _leaky_relu,
}
