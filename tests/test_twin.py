"""A frozen twin computes what its model does in eval mode, after each refresh, or is refused; the model never notices."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from models import (
    batch,
    cnn,
    one_thread,  # noqa: F401
    seeded,
    state,
    surroundings,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

import fastadv
from benchmarks.models import PreActBlock
from fastadv.engine.twin import LAYERS, Twin, TwinError


class Net(nn.Module):
    """Named modules and tensors, and a function of them and x."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class BasicBlock(nn.Module):
    """Of torchvision's ResNet, with its ReLU as a function."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class OwnConv(nn.Conv2d):
    """Weight standardisation: what a subclass computes is not a convolution with its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class OwnNorm(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        pass  # by a condition, which could not be traced

    def forward(self, x):
        return 2 * super().forward(x)


def norm(kind=nn.BatchNorm2d, channels=6, **options):
    return kind(channels, **options)


def conv(**options):
    return nn.Conv2d(3, 6, 3, padding=1, **options)


@seeded
def scatter(net):
    """Every parameter and floating buffer becomes another; variances stay positive."""
    with torch.no_grad():
        for name, t in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var"):
                t.uniform_(0.2, 2)
            elif t.is_floating_point():
                t.normal_(std=0.5)
    return net


def tied():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    net[2].weight = net[4].weight = net[0].weight
    return net


def no_beta():
    net = nn.Sequential(conv(), norm())
    net[1].bias = None
    return net


def compiled_in_place():
    """A flag on the model; what it compiles is none of the copy's business."""
    net = cnn()
    net.compile(backend="eager")
    return net


# What folds, by name: layers to norms. Each net is made where its generator is seeded.
FOLDED = {
    "cnn": (cnn, {"0": "1", "4": "5"}),
    "resnet": (
        lambda: nn.Sequential(conv(), norm(), nn.ReLU(), BasicBlock(6, 6, 1), BasicBlock(6, 8, 2)),
        {"0": "1", "3.conv1": "3.bn1", "3.conv2": "3.bn2", "4.conv1": "4.bn1", "4.conv2": "4.bn2",
         "4.shortcut.0": "4.shortcut.1"},
    ),
    "preact": (
        lambda: nn.Sequential(conv(), PreActBlock(6, 6, 1), PreActBlock(6, 8, 2)),
        {"1.conv1": "1.bn2", "2.conv1": "2.bn2"},
    ),
    "no bias": (lambda: nn.Sequential(conv(bias=False), norm()), {"0": "1"}),
    "no affine": (lambda: nn.Sequential(conv(), norm(affine=False)), {"0": "1"}),
    "no beta": (no_beta, {"0": "1"}),
    "other eps": (lambda: nn.Sequential(conv(), norm(eps=0.1)), {"0": "1"}),
    "grouped": (lambda: nn.Sequential(conv(groups=3, dilation=2, stride=2, padding_mode="reflect"), norm()), {"0": "1"}),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), norm(channels=3)), {"0": "1"}),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, stride=2), norm()), {"0": "1"}),
    "transposed groups": (
        lambda: nn.Sequential(conv(), nn.ConvTranspose2d(6, 9, 3, groups=3), norm(channels=9)),
        {"1": "2"},
    ),
    "1d": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3), norm(nn.BatchNorm1d)), {"1": "2"}),
    "transposed 1d": (lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(3, 6, 3), norm(nn.BatchNorm1d)), {"1": "2"}),
    "3d": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 6, 3), norm(nn.BatchNorm3d)),
        {"1": "2"},
    ),
    "sync norm": (lambda: nn.Sequential(conv(), norm(nn.SyncBatchNorm)), {"0": "1"}),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), norm(nn.BatchNorm1d), nn.Linear(6, 4)), {"1": "2"}),
    "linear, no bias": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6, bias=False), norm(nn.BatchNorm1d)), {"1": "2"}),
    "tied layers": (tied, {"0": "1", "2": "3"}),
    "keyword defaults": (lambda: Optional(), {"conv": "norm"}),
    # what does not
    "output used twice": (lambda: Net(lambda m, x: m.norm(a := m.conv(x)) + a, conv=conv(), norm=norm()), {}),
    "norm first": (lambda: nn.Sequential(norm(channels=3), conv()), {}),
    "between": (lambda: nn.Sequential(conv(), nn.ReLU(), norm()), {}),
    "conv called twice": (
        lambda: Net(lambda m, x: m.norm(m.conv(x)) + m.conv(x).exp(), conv=conv(), norm=norm()),
        {},
    ),
    "norm called twice": (
        lambda: Net(lambda m, x: m.norm(m.a(x)) * m.norm(m.b(x)), a=conv(), b=conv(), norm=norm()),
        {},
    ),
    "weight read": (lambda: Net(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.mean(), conv=conv(), norm=norm()), {}),
    "no statistics": (lambda: nn.Sequential(conv(), norm(track_running_stats=False)), {}),
    "subclass of a conv": (lambda: nn.Sequential(OwnConv(3, 6, 3), norm()), {}),
    "subclass of a norm": (lambda: nn.Sequential(conv(), OwnNorm(6)), {}),
    "group norm": (lambda: nn.Sequential(conv(), nn.GroupNorm(2, 6)), {}),
    "norm over tokens": (lambda: nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 5), norm(nn.BatchNorm1d, 24)), {}),
    "norm as a function": (
        lambda: Net(lambda m, x: F.batch_norm(m.conv(x), m.mean, m.running_var), conv=conv(), mean=nn.Buffer(torch.zeros(6)),
                    running_var=nn.Buffer(torch.ones(6))),
        {},
    ),
    # other things to copy
    "single layer": (lambda: nn.Conv2d(3, 4, 3), {}),
    "own parameters": (
        lambda: Net(
            lambda m, x: F.linear(((x - 2 * m.mean) / m.scale).flatten(1), m.weight * m.weights[0]),
            weight=nn.Parameter(torch.rand(5, 192)), weights=nn.ParameterList([torch.rand(192)]), scale=torch.rand(3, 8, 8),
            mean=nn.Buffer(torch.rand(3, 8, 8)),
        ),
        {},
    ),
    "normalised": (
        lambda: nn.Sequential(fastadv.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), conv(), norm()),
        {"1": "2"},
    ),
    "compiled in place": (compiled_in_place, {"0": "1", "4": "5"}),
    "attention": (
        lambda: Net(lambda m, x: m.mix(x.flatten(2), x.flatten(2), x.flatten(2))[0], mix=nn.MultiheadAttention(64, 2)),
        {},
    ),
}  # fmt: skip


class Optional(nn.Module):
    """Does otherwise where its other arguments are given, which a trace of its own forward could not tell."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x, mask=None, features=False):
        if mask is not None:
            x = x * mask
        x = self.norm(self.conv(x))
        return (x, x) if features else x


@pytest.fixture(params=FOLDED)
def case(request):
    build, folds = FOLDED[request.param]
    return scattered(build).double(), folds


@seeded
def scattered(build):
    return scatter(build(), seed=1)


def logits_and_gradient(net, x):
    x = x.clone().requires_grad_()
    out = net(x)
    (gradient,) = torch.autograd.grad(out, x, torch.arange(out.numel()).view(out.shape).cos().to(out))
    return out.detach(), gradient


def assert_same(twin, net, dtype=torch.float64, bound=1e-10):
    """Logits and input gradient, in units of their largest."""
    x, _ = batch(dtype=dtype)
    frozen = copy.deepcopy(net).eval()
    for ours, theirs in zip(logits_and_gradient(twin.module, x), logits_and_gradient(frozen, x), strict=True):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


def addresses(twin):
    return {name: t.data_ptr() for name, t in [*twin.module.named_parameters(), *twin.module.named_buffers()]}


# ------------------------------------------------------------------------------------------------------------- folding


def test_logits_and_gradients_are_the_models(case):
    net, _ = case
    twin = Twin(net)
    assert_same(twin, net)
    scatter(net)
    with pytest.raises(AssertionError):
        assert_same(twin, net)
    before = addresses(twin)
    twin.refresh()
    assert_same(twin, net)
    assert addresses(twin) == before
    assert twin.fits(net)


def test_what_folds(case):
    net, folds = case
    twin = Twin(net)
    norms = {name for name, m in net.named_modules() if isinstance(m, _BatchNorm) and type(m) is not OwnNorm}
    left = {name for name, m in twin.module.named_modules() if isinstance(m, _BatchNorm)}
    assert left == {f"model.{name}" for name in norms - {*folds.values()}}
    layers = {name for name, m in twin.module.named_modules() if type(m) in LAYERS and m.bias is not None}
    assert layers >= {f"model.{name}" for name in folds}


def test_a_norm_over_tokens_is_not_one_over_features():
    """Of [N, L, F] with L = F; untrained, a norm is the same over both, so only the shape can tell."""
    twin = Twin(nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 24), nn.BatchNorm1d(24)))
    with pytest.raises(TwinError, match=r"folded for \[N, F\] only; got \[6, 24, 24\]"):
        twin.check(batch()[0])


# -------------------------------------------------------------------------------------------------------------- refresh


def classifier():
    """With norms that fold and one that does not, and tensors of every kind."""
    return scattered(
        lambda: Net(
            lambda m, x: m.tail(m.last(m.body(x) * m.scale)) + m.shift,
            body=cnn()[:4], last=nn.BatchNorm2d(6), tail=cnn()[4:], scale=nn.Parameter(torch.ones(())), shift=torch.zeros(10),
        )
    ).double()  # fmt: skip


def steps(kind, **options):
    def change(net):
        optimizer = kind(net.parameters(), lr=0.1, **options)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(batch(dtype=torch.float64)[0]), batch()[1]).backward()
            optimizer.step()

    return change


def training_forward(net):
    net.train()(batch(dtype=torch.float64)[0])


def data_write(net):
    for p in net.parameters():
        p.data.mul_(1.1)


def new_data(net):
    for p in net.parameters():
        p.data = p.data * 1.1


def loads(**options):
    return lambda net: net.load_state_dict(scatter(copy.deepcopy(net)).state_dict(), **options)


def ema_swap(net):
    """The averaged weights are put in for an evaluation, as public code does it."""
    for p, average in zip(net.parameters(), scatter(copy.deepcopy(net)).parameters(), strict=True):
        p.data, average.data = average.data, p.data


def new_parameters(net):
    net.body[0].weight = nn.Parameter(net.body[0].weight.detach() * 2)


def new_attribute(net):
    net.shift = net.shift + 1


def in_inference_mode(net):
    with torch.inference_mode():
        net.body[0].weight.mul_(2)
        net.last.running_mean.add_(1)


def other_layout(net):
    scatter(net.to(memory_format=torch.channels_last))


CHANGES = {
    "SGD": steps(torch.optim.SGD),
    "SGD, fused": steps(torch.optim.SGD, fused=True),
    "Adam, foreach": steps(torch.optim.Adam, foreach=True),
    "AdamW, fused": steps(torch.optim.AdamW, fused=True),
    "training forward": training_forward,
    ".data write": data_write,
    ".data": new_data,
    "load_state_dict": loads(),
    "load_state_dict, assign": loads(assign=True),
    "EMA swap": ema_swap,
    "new parameter": new_parameters,
    "new attribute": new_attribute,
    "in inference mode": in_inference_mode,
    "memory format": other_layout,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_refresh_after_the_model_changed(change, context):
    net = classifier()
    with context():
        twin = Twin(net)
    assert_same(twin, net)
    before = addresses(twin)
    change(net)
    with pytest.raises(AssertionError):
        assert_same(twin, net)
    untouched, around = state(net), surroundings()
    with context():
        twin.refresh()
    assert_same(twin, net)
    assert addresses(twin) == before
    assert state(net) == untouched
    assert surroundings() == around
    assert twin.fits(net)


def test_refresh_inside_a_weight_perturbation():
    net = classifier()
    twin, x, y = Twin(net), *batch(dtype=torch.float64)
    with fastadv.AWP(net, gamma=0.5).perturb(lambda: F.cross_entropy(net(x), y)):
        with pytest.raises(AssertionError):
            assert_same(twin, net)
        twin.refresh()
        assert_same(twin, net)
    twin.refresh()
    assert_same(twin, net)


def test_weights_that_are_parted_later():
    """Tied in the model when the twin was made, so that it had read one for both."""
    net = Net(lambda m, x: (x.flatten(1) @ m.a + m.b).sum(1, keepdim=True), a=nn.Parameter(torch.rand(192, 192)))
    net.b = net.a
    twin = Twin(net)
    net.b = nn.Parameter(torch.rand(192, 192))
    assert not twin.fits(net)


def test_an_attack_on_the_twin_is_one_on_the_model():
    net, (x, y) = classifier().eval(), batch(dtype=torch.float64)
    twin = Twin(net)
    attacked = [
        fastadv.pgd(model, x, y, eps=8 / 255, steps=3, generator=torch.Generator().manual_seed(0))
        for model in (net, twin.module)
    ]
    assert torch.allclose(*attacked, rtol=0, atol=1e-12)
    assert (attacked[0] - x).abs().max() > 7 / 255


# ------------------------------------------------------------------------------------------------------ the model's state


def train_mode(net):
    net.train()


def eval_mode(net):
    net.eval()


def mixed_modes(net):
    net.train()
    net.last.eval()
    net.body[0].weight.requires_grad_(False)


@pytest.mark.parametrize("mode", [train_mode, eval_mode, mixed_modes])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(mode, context):
    net = classifier()
    F.cross_entropy(net(batch(dtype=torch.float64)[0]), batch()[1]).backward()
    mode(net)
    before, around, attributes = state(net), surroundings(), {**vars(net)}
    with context():
        twin = Twin(net)
        twin.refresh()
        twin.check(batch(dtype=torch.float64)[0])
    assert state(net) == before
    assert surroundings() == around
    assert vars(net) == attributes


def test_a_refused_model_is_left_as_it_was():
    net = Net(lambda m, x: m.net(x) if x.sum() > 0 else x, net=cnn().train())
    before, around = state(net), surroundings()
    with pytest.raises(TwinError):
        Twin(net)
    assert state(net) == before
    assert surroundings() == around


def test_tracing_leaves_no_mark_on_the_model():
    def function(m, x):
        m.features = m.net(x)
        m.calls += 1
        return m.features

    net = Net(function, net=cnn(), calls=0)
    Twin(net)
    assert net.calls == 0
    assert not hasattr(net, "features")


def test_the_twin_is_a_frozen_copy(case):
    """It shares nothing, is in eval mode, and its convolutions over images are in channels_last."""
    net, _ = case
    twin = Twin(net.train())
    theirs = [t for m in net.modules() for t in [*vars(m).values(), *m.parameters(), *m.buffers()] if isinstance(t, Tensor)]
    ours = [*twin.module.parameters(), *twin.module.buffers()]
    storages = {t.untyped_storage().data_ptr() for t in ours}
    assert len(storages) == len(ours)
    assert not storages & {t.untyped_storage().data_ptr() for t in theirs}
    assert not {*net.modules()} & {*twin.module.modules()}
    assert not any(t.requires_grad for t in ours)
    for m in twin.module.modules():
        assert not m.training
        if type(m) in (nn.Conv2d, nn.ConvTranspose2d):
            assert m.weight.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------- fits


def set_attribute(net):
    net.temperature = 2.0


def set_function(net):
    net.function = lambda m, x: m.body(x)


def set_list(net):
    net.widths[0] = 7


REMADE = {
    "float32": lambda net: net.float(),
    "another layer": lambda net: setattr(net.body, "2", nn.ReLU()),
    "another activation": lambda net: setattr(net.body, "2", nn.GELU()),
    "another class": lambda net: setattr(net.body[2], "__class__", nn.SiLU),
    "another shape": lambda net: setattr(net.tail[4], "weight", nn.Parameter(torch.rand(9, 72).double())),
    "bias gone": lambda net: setattr(net.tail[4], "bias", None),
    "eps": lambda net: setattr(net.last, "eps", 0.1),
    "stride": lambda net: setattr(net.tail[0], "stride", (1, 1)),
    "number": set_attribute,
    "function": set_function,
    "list": set_list,
    "tensor gone": lambda net: delattr(net, "shift"),
    "attribute's shape": lambda net: setattr(net, "shift", torch.zeros(1)),
    "hook": lambda net: net.body[0].register_forward_hook(lambda *_: None),
    "parametrization": lambda net: parametrizations.weight_norm(net.body[0]),
}


@pytest.mark.parametrize("change", REMADE.values(), ids=REMADE)
def test_a_twin_does_not_fit_another_model(change):
    net = classifier()
    net.temperature, net.widths = 1.0, [6, 8]
    twin = Twin(net.train())
    assert twin.fits(net.eval())
    change(net)
    assert not twin.fits(net)


def test_a_twin_fits_only_the_model_it_refreshes_from():
    net = classifier()
    assert not Twin(net).fits(copy.deepcopy(net))


# --------------------------------------------------------------------------------------------------------------- refusals


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def without_grad(m, x):
    with torch.no_grad():
        return m.conv(x)


def own_autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        return m.conv(x)


def inside(layer):
    return nn.Sequential(nn.ReLU(), nn.Sequential(layer))  # where it is model.1.0


def hooked(register):
    net = inside(conv())
    getattr(net[1][0], register)(lambda *_: None)
    return net


def patched():
    net = inside(conv())
    net[1][0].forward = net[0].forward
    return net


OUTSIDE = torch.ones(())


REFUSED = {
    "function": (lambda: torch.relu, r"^model: a \w+ is not an nn.Module"),
    "compiled": (lambda: inside(torch.compile(conv())), r"^model.1.0: a OptimizedModule cannot be copied"),
    "scripted": (lambda: torch.jit.script(conv()), r"^model: a RecursiveScriptModule cannot be copied"),
    "traced": (lambda: torch.jit.trace(conv(), batch()[0]), r"^model: a \w+ cannot be copied"),
    "DataParallel": (lambda: nn.DataParallel(conv()), r"^model: a DataParallel cannot be copied; attack the module inside it"),
    "forward hook": (lambda: hooked("register_forward_hook"), r"^model.1.0: it has hooks"),
    "pre-hook": (lambda: hooked("register_forward_pre_hook"), r"^model.1.0: it has hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), r"^model.1.0: it has hooks"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), r"^model.1.0: it has hooks"),
    "hook on the model": (lambda: hook_on_all(), r"^model: it has hooks"),
    "parametrization": (lambda: inside(parametrizations.weight_norm(conv())), r"^model.1.0: it is parametrized"),
    "spectral norm": (lambda: inside(nn.utils.spectral_norm(conv())), r"^model.1.0: it has hooks"),
    "lazy": (lambda: inside(nn.LazyConv2d(3, 3)), r"^model.1.0: it has hooks"),
    "patched forward": (patched, r"^model.1.0: its forward is not its class's"),
    "tensor subclass": (
        lambda: Net(lambda m, x: x * m.t, t=nn.Parameter(Subclass(torch.ones(())))),
        "^model.t: a Subclass is not",
    ),
    "not copied": (lambda: Net(lambda m, x: x, t=(i for i in ())), "^model: it cannot be copied: TypeError"),
    "control flow": (
        lambda: inside(Net(lambda m, x: x if x.sum() > 0 else -x)),
        r"^model.1.0: it cannot be traced: TraceError: [^\n]+\Z",
    ),
    "no_grad": (lambda: inside(Net(without_grad, conv=conv())), r"^model.1.0.conv: it computes under torch.no_grad"),
    "autograd.Function": (lambda: inside(Net(lambda m, x: Straight.apply(x))), r"^model.1.0: it .* or in an autograd.Function"),
    "own autocast": (lambda: inside(Net(own_autocast, conv=conv())), r"^model.1.0.conv: it computes under a torch.autocast"),
    "global tensor": (lambda: inside(Net(lambda m, x: x * OUTSIDE)), r"^model.1.0: it uses a tensor that is no parameter"),
    "tensor in a list": (lambda: Net(lambda m, x: x * m.t[0], t=[torch.ones(())]), r"^model: it uses a tensor that is no"),
    "op on an attribute": (lambda: Net(lambda m, x: x * (2 * m.t), t=torch.ones(())), r"^model: it calls aten.mul.Tensor on"),
    "value of an attribute": (
        lambda: Net(lambda m, x: x * float(m.t), t=torch.ones(())),
        r"^model: it calls aten._local_scalar",
    ),
    "random number": (lambda: Net(lambda m, x: x * torch.rand(1)), r"^model: it calls aten.rand"),
    "odd result": (lambda: Net(lambda m, x: object()), r"^model: it cannot be traced: NotImplementedError"),
    "module outside": (lambda: Net(lambda m, x: m.t[0](x), t=[conv()]), r"^model: it cannot be traced: NameError"),
}


class Subclass(Tensor):
    pass


def hook_on_all():
    net = inside(conv())
    net.register_forward_hook(lambda *_: None)
    return net


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_where_and_why(build, reason):
    with pytest.raises(TwinError, match=reason) as caught:
        Twin(build())
    assert "\n" not in str(caught.value)


def test_ddp_is_refused_but_not_what_it_wraps(process_group):
    with pytest.raises(TwinError, match=r"^model: a DistributedDataParallel cannot be copied; attack the module inside it"):
        Twin(nn.parallel.DistributedDataParallel(net := conv()))
    Twin(net).check(batch()[0])


def test_check_finds_what_tracing_kept():
    x, _ = batch()
    net = Net(lambda m, x: m.net(x) + random.random(), net=cnn())
    with pytest.raises(TwinError, match=r"^model: its logits, up to .* and its twin's differ by"):
        Twin(net).check(x)
    Twin(cnn()).check(x)


@pytest.mark.parametrize(("dtype", "off"), [(None, 1e-3), (torch.bfloat16, 0.1)])
def test_check_allows_for_rounding_and_no_more(dtype, off):
    x, _ = batch()
    net = cnn()
    twin = Twin(net, dtype)
    twin.check(x)
    net[8].bias.data.add_(off * net.eval()(x).abs().max())
    with pytest.raises(TwinError, match="differ by"):
        twin.check(x)
    twin.refresh()
    twin.check(x)


def test_check_allows_for_the_rounding_of_an_autocast_around_it():
    twin, (x, _) = Twin(scattered(cnn)), batch()
    with autocast(torch.bfloat16):
        twin.check(x)


def test_check_says_that_the_twin_fails():
    net = Net(lambda m, x: m.net(x), net=cnn())
    twin = Twin(net)
    twin.module.get_submodule("model.net.8").weight.data = torch.zeros(10, 71)
    with pytest.raises(TwinError, match=r"^model: its twin fails where it does not: RuntimeError"):
        twin.check(batch()[0])


# -------------------------------------------------------------------------------------------------------------- precision


def autocast(dtype):
    return torch.autocast("cpu", dtype, cache_enabled=False)


def test_half_precision_weights_are_cast_once():
    """And only these: norms that are left, and what forward reads by itself, keep their precision."""
    net = scattered(
        lambda: Net(
            lambda m, x: m.linear(m.norm(F.relu(m.conv(x))).mean((2, 3))) * m.read.weight.sum() + m.read(x).mean((2, 3)),
            conv=conv(), norm=norm(), read=nn.Conv2d(3, 4, 3), linear=nn.Linear(6, 4),
        )
    )  # fmt: skip
    twin = Twin(net, torch.bfloat16)
    half = {name for name, t in twin.module.named_parameters() if t.dtype == torch.bfloat16}
    assert half == {f"model.{layer}.{kind}" for layer in ("conv", "linear") for kind in ("weight", "bias")}
    assert all(t.dtype != torch.bfloat16 for t in twin.module.buffers())
    twin.check(batch()[0])


def test_half_precision_without_folds_is_autocast_exactly():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)), batch()[0]
    twin = Twin(net, torch.bfloat16)
    with autocast(torch.bfloat16):
        assert torch.equal(twin.module(x), net(x))


def test_half_precision_is_autocast_up_to_rounding(case):
    net, _ = case
    net.float()
    twin, (x, _) = Twin(net, torch.bfloat16), batch()
    scatter(net)
    before = addresses(twin)
    twin.refresh()
    assert addresses(twin) == before
    with autocast(torch.bfloat16), torch.no_grad():
        ours, theirs = twin.module(x).double(), copy.deepcopy(net).eval()(x).double()
    exact = copy.deepcopy(net).eval().double()(x.double())
    assert (ours - theirs).norm() <= 2**-5 * theirs.norm()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 2**-9 * exact.norm()


def test_fp64_stays_fp64_under_autocast():
    """Which does not cast it."""
    twin = Twin(classifier(), torch.bfloat16)
    assert all(p.dtype == torch.float64 for p in twin.module.parameters())
    with autocast(torch.bfloat16):
        assert_same(twin, classifier())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_folded_in_float32(dtype):
    net = cnn().to(dtype)
    twin = Twin(net)
    assert {p.dtype for p in twin.module.parameters()} == {dtype}
    scale = net[1].weight.double() / (net[1].running_var.double() + net[1].eps).sqrt()
    exact = net[0].weight.double() * scale.view(-1, 1, 1, 1)
    ours = twin.module.get_submodule("model.0").weight.double()
    assert ((ours - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs()).all()
