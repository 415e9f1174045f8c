"""Input normalisation as part of the model, so that attacks, eps and bounds stay in pixel units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel: ``model = nn.Sequential(fastadv.Normalize(mean, std), net)``.

    Args:
        mean, std: one number a channel, or a single one for all; in the units of x; held in fp32 like parameters.
            x is [N, C, ...].

    Raises:
        ValueError: lengths differ, a value is not finite, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        try:
            mean_, std_ = (torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in (mean, std))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"mean and std must be numbers, one a channel; got mean={mean!r}, std={std!r}") from None
        ok = mean_.shape == std_.shape and len(mean_) and mean_.isfinite().all() and std_.isfinite().all() and (std_ > 0).all()
        if not ok:
            raise ValueError(
                "mean and std must be equally long, at least one number, finite, and std positive; "
                f"got mean={mean!r}, std={std!r}"
            )
        self.register_buffer("mean", mean_, persistent=False)
        self.register_buffer("std", std_, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or self.mean.numel() not in (1, x.shape[1]):
            raise ValueError(f"x must have {self.mean.numel()} channels, [N, {self.mean.numel()}, ...]; got {list(x.shape)}")
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - self.mean.to(x.dtype).view(shape)) / self.std.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"
