"""What the tests attack: small models, well-behaved and not, small batches for them, and how to see a disturbance."""

from __future__ import annotations

import functools
import pickle
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Images this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(n: int = 6, classes: int = 10, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE):
    """The same n images in [0, 1] and labels each time, without touching the global generator."""
    g = torch.Generator().manual_seed(n)
    return torch.rand(n, *shape, generator=g).to(dtype), torch.randint(classes, (n,), generator=g)


def seed(value: int = 0) -> torch.Generator:
    """A generator that draws the same each time."""
    return torch.Generator().manual_seed(value)


def seeded(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The same weights each time, without touching the global generator."""

    @functools.wraps(build)
    def wrapper(*args, seed: int = 0, **kwargs) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(*args, **kwargs)

    return wrapper


@seeded
def cnn(classes: int = 10, dropout: float = 0.5) -> nn.Module:
    """Batch normalisation with running statistics unlike any batch's, and dropout: both differ between the modes."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes),
    )  # fmt: skip
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return net


@seeded
def linear(classes: int = 10, features: int = 192) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


@seeded
def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1700 shuffled 8x8 digits in [0, 1] with labels: scikit-learn's, which mlxtend brings along, or made-up ones."""
    g = torch.Generator().manual_seed(0)
    try:
        from sklearn.datasets import load_digits

        data = load_digits()
        x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    except ImportError:
        y = torch.arange(1800) % 10
        x = (torch.rand(10, 1, 8, 8, generator=g)[y] + 0.25 * torch.randn(1800, 1, 8, 8, generator=g)).clamp(0, 1)
    shuffled = torch.randperm(len(x), generator=g)[:1700]
    return x[shuffled], y[shuffled]


@functools.cache
def trained_lenet() -> nn.Module:
    """Trained on the first 1200 digits, in eval mode; the other 500 are for tests. Do not modify."""
    x, y = digits()
    net = lenet()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for i in [*range(0, 1200, 100)] * 10:
        optimizer.zero_grad()
        F.cross_entropy(net(x[i : i + 100]), y[i : i + 100]).backward()
        optimizer.step()
    return net.eval()


class FailsAt(nn.Module):
    """Raises ``error`` instead of making its k-th call (from 0)."""

    def __init__(self, net: nn.Module, k: int, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.net, self.k, self.error, self.calls = net, k, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.k + 1:
            raise self.error("as the test asked")
        return self.net(x)


class NaNGradient(nn.Module):
    """The input gradient of one image of the batch is NaN; its logits are not."""

    def __init__(self, net: nn.Module, row: int) -> None:
        super().__init__()
        self.net, self.row = net, row

    def forward(self, x: Tensor) -> Tensor:
        nothing = (0 * x[self.row]).sum().sqrt()  # 0, with the derivative 0 * inf
        logits = self.net(x)
        return torch.cat([logits[: self.row], (logits[self.row] + nothing)[None], logits[self.row + 1 :]])


class Answers(nn.Module):
    """Calls ``function(logits, x)`` on the logits of a sound model, and counts its calls."""

    def __init__(self, function: Callable[[Tensor, Tensor], object], classes: int = 10) -> None:
        super().__init__()
        self.net, self.function, self.calls = cnn(classes), function, 0

    def forward(self, x: Tensor) -> object:
        self.calls += 1
        return self.function(self.net(x), x)


def count_calls(model: nn.Module) -> list[Tensor]:
    """A list that grows by the input of each call of the model."""
    calls: list[Tensor] = []
    model.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].detach().clone()))
    return calls


def state(model: nn.Module, buffers: bool = True) -> tuple:
    """Everything about a model that an attack could disturb, comparable."""
    modules = [(name, m.training, getattr(m, "track_running_stats", None)) for name, m in model.named_modules()]
    parameters = [
        (name, id(p), p.data_ptr(), p._version, p.requires_grad, id(p.grad), p.detach().numpy().tobytes(),
         p.grad is not None and (p.grad._version, p.grad.numpy().tobytes()))
        for name, p in model.named_parameters()
    ]  # fmt: skip
    kept = [(name, id(b), b._version, b.numpy().tobytes()) for name, b in model.named_buffers()] if buffers else []
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    return modules, parameters, kept, hooks


def surroundings() -> tuple:
    """The settings of the process and thread that an attack could leave changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        pickle.dumps(np.random.get_state()),
        sys.gettrace(),
    )


class Ops(TorchDispatchMode):
    """Records what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::item", "aten::is_nonzero"}
