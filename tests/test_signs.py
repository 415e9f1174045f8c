"""signs_only: the bits of plain autograd, from several times less saved memory, and nothing where it would not be exact."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from models import SYNCS, Ops, batch, cnn, one_thread, seeded  # noqa: F401
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointError, checkpoint

import benchmarks.memory
import benchmarks.models
import fastadv
from fastadv.engine import attacking
from fastadv.engine.signs import signs_only


def frozen(module: nn.Module) -> nn.Module:
    """In eval mode, no parameter or buffer at its initial value, none with a gradient."""
    g = torch.Generator().manual_seed(1)
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            t.data += 0.2 * torch.rand(t.shape, generator=g)
    return module.eval().requires_grad_(False)


def run(function, x: Tensor, context, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """The output and the input gradient, for a cotangent in the output's layout."""
    x = x.clone().requires_grad_()  # clone keeps strides where these are dense
    with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y).copy_(cotangent))
    return y, dx


def assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=0, atol=0, equal_nan=True, check_stride=True)


def assert_exact(function, x: Tensor, autocast: bool = False) -> None:
    assert_same(run(function, x, signs_only(), autocast), run(function, x, contextlib.nullcontext(), autocast))


def saves(function, x: Tensor) -> list[tuple[torch.dtype, int]]:
    """Type and number of elements of what is saved for the input gradient of a function without weights."""
    saved: list[tuple[torch.dtype, int]] = []
    x = x.clone().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.numel())), lambda _: None)
    with hooks, signs_only():
        function(x)
    return saved


def image(layout: str, dims: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """2 images of 4 channels, 8 pixels a side, around 0: dense in one of two layouts, or a window of a larger one."""
    x = torch.randn(2, 4, *[8] * dims, generator=torch.Generator().manual_seed(dims)).to(dtype)
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.cat([x, x], -1)[..., 3:10] if layout == "window" else x


LAYOUTS = ("contiguous", "channels last", "window")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# ------------------------------------------------------------------------------------------------- with weights

LAYERS = {
    "conv1d": (1, lambda: nn.Conv1d(4, 6, 3)),
    "conv1d same": (1, lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2)),
    "conv2d": (2, lambda: nn.Conv2d(4, 6, 3, padding=1)),
    "conv2d of one width": (2, lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False)),  # its gradients stand in for its input
    "conv2d 1x1": (2, lambda: nn.Conv2d(4, 8, 1, bias=False)),
    "conv2d valid": (2, lambda: nn.Conv2d(4, 6, 3, padding="valid")),
    "conv2d same": (2, lambda: nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(1, 2))),
    "conv2d all options": (2, lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2)),
    "conv2d depthwise": (2, lambda: nn.Conv2d(4, 8, 3, stride=2, groups=4)),
    "conv2d circular": (2, lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
    "conv3d": (3, lambda: nn.Conv3d(4, 6, 3, stride=2, padding=1)),
    "batch_norm": (2, lambda: nn.BatchNorm2d(4)),
    "batch_norm plain": (2, lambda: nn.BatchNorm2d(4, affine=False, eps=0.1)),
    "batch_norm 1d": (1, lambda: nn.BatchNorm1d(4)),
    "batch_norm 3d": (3, lambda: nn.BatchNorm3d(4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_exact_and_save_no_activation(layer, layout):
    dims, build = LAYERS[layer]
    for dtype in DTYPES:
        module = frozen(seeded(build)()).to(dtype)
        x = image(layout, dims, dtype)
        assert_exact(module, x)
        leaf = x.clone().requires_grad_()
        with signs_only():
            assert benchmarks.memory.saved_bytes(module, lambda: module(leaf)) == 0  # noqa: B023
        assert benchmarks.memory.saved_bytes(module, lambda: module(leaf)) > 0  # noqa: B023


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_under_autocast_are_exact(layer, layout):
    dims, build = LAYERS[layer]
    assert_exact(frozen(seeded(build)()), image(layout, dims), autocast=True)


def test_weights_of_another_layout_decide_the_format_of_results():
    net = frozen(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())).to(memory_format=torch.channels_last)
    assert_exact(net, image("contiguous"))


def test_autocast_saves_no_cast_of_a_weight():
    net, x = frozen(nn.Sequential(nn.Conv2d(4, 64, 3), nn.ReLU())), image("contiguous").requires_grad_()
    with signs_only(), torch.autocast("cpu", torch.bfloat16):
        assert benchmarks.memory.saved_bytes(net, lambda: net(x)) == 2 * 64 * 6 * 6


@pytest.mark.parametrize("forward", [True, False])
def test_autocast_around_one_of_the_two_passes_alone(forward):
    net = frozen(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 2, 3)))
    x = image("contiguous").requires_grad_()

    def gradient(context) -> tuple[Tensor]:
        with context, torch.autocast("cpu", torch.bfloat16, enabled=forward):
            y = net(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=not forward):
            return torch.autograd.grad(y, x, torch.ones_like(y))

    assert_same(gradient(signs_only()), gradient(contextlib.nullcontext()))


def test_a_leaf_shared_under_autocast_has_all_its_gradient():
    """Convolutions and others read one cast of it in plain autograd; here the gradients are summed in fp32, not in bf16."""
    weights = [0.1 * torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def paths(x: Tensor) -> Tensor:
        a, b = F.conv2d(x, weights[0], padding=1), F.conv2d(x, weights[1], padding=1)
        return a + b + F.conv_transpose2d(x, weights[2], padding=1)

    (y, dx), (y_plain, dx_plain) = (run(paths, image("contiguous"), c, True) for c in (signs_only(), contextlib.nullcontext()))
    assert torch.equal(y, y_plain)
    torch.testing.assert_close(dx, dx_plain, rtol=2**-7, atol=2**-7)


# ----------------------------------------------------------------------------------------------- activations, pools


def in_place(function):
    """Of a copy, which is returned whatever the function returns."""

    def copied(x: Tensor) -> Tensor:
        y = x * 1
        function(y)
        return y

    return copied


ACTIVATIONS = {
    "F.relu": F.relu,
    "F.relu in place": in_place(lambda y: F.relu(y, inplace=True)),
    "torch.relu": torch.relu,
    "torch.relu_": in_place(torch.relu_),
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": in_place(lambda y: y.relu_()),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": in_place(nn.ReLU(inplace=True)),
    "F.relu6": lambda x: F.relu6(4 * x),
    "F.relu6 in place": in_place(lambda y: F.relu6(y.mul_(4), inplace=True)),
    "nn.ReLU6": lambda x: nn.ReLU6()(4 * x),
    "nn.ReLU6 in place": in_place(lambda y: nn.ReLU6(inplace=True)(y.mul_(4))),
    "nn.Hardtanh": nn.Hardtanh(-0.1, 0.7),  # bounds that no binary floating-point number has
    "nn.Hardtanh in place": in_place(nn.Hardtanh(-0.1, 0.7, inplace=True)),
    "F.leaky_relu": F.leaky_relu,
    "nn.LeakyReLU": nn.LeakyReLU(0.3),
    "nn.LeakyReLU in place": in_place(nn.LeakyReLU(0.3, inplace=True)),
    "nn.LeakyReLU of 0": nn.LeakyReLU(0.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_and_save_a_bool_an_element(activation, layout):
    function = ACTIVATIONS[activation]
    for dtype in DTYPES:
        x = image(layout, dtype=dtype)
        assert_exact(function, x)
        assert saves(function, x) == [(torch.bool, x.numel())]
    assert_exact(function, image(layout), autocast=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_their_edges(activation):
    """At zeros and bounds, at NaN and infinities, in full vectors and the rest of a row, for gradients of all kinds."""
    function = ACTIVATIONS[activation]
    edges = torch.tensor([0.0, -0.0, -0.1, 0.7, 1.5, -1.0, 1.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45])
    for dtype in (*DTYPES, torch.float16):
        x = edges.to(dtype).repeat(3, 3).requires_grad_()  # 36 a row: full vectors and a rest
        for value in (1.5, -0.0, torch.inf, torch.nan):
            cotangent = torch.full_like(x, value)
            (expected,) = torch.autograd.grad(function(x), x, cotangent)
            with signs_only():
                y = function(x)
            assert_same(torch.autograd.grad(y, x, cotangent), (expected,))


POOLS = {
    "halving": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "all options": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "ceil_mode": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", POOLS)
def test_max_pools_are_exact_and_save_small_indices(pool, layout):
    module = nn.MaxPool2d(**POOLS[pool])
    for dtype in DTYPES:
        x = image(layout, dtype=dtype).round(decimals=0)  # ties
        for function in (module, lambda x: torch.max_pool2d(x, **POOLS[pool])):
            assert_exact(function, x)
            assert saves(function, x) == [(torch.int16, module(x).numel())]
    assert_exact(module, image(layout), autocast=True)
    assert_exact(module, image(layout)[0])  # one image, without a batch


@pytest.mark.parametrize(("pixels", "dtype"), [((128, 256), torch.int16), ((128, 257), torch.int32)])
def test_the_last_pixel_of_a_large_image_has_an_index(pixels, dtype):
    x = torch.arange(128 * 257.0)[: pixels[0] * pixels[1]].reshape(1, 1, *pixels)
    assert_exact(nn.MaxPool2d(2), x)
    assert saves(nn.MaxPool2d(2), x)[0][0] is dtype


# -------------------------------------------------------------------------------------------------- whole networks


class Residual(nn.Module):
    """As torchvision's: activations in place, on a sum too, whose terms are read elsewhere."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


class Twice(nn.Module):
    """A ReLU's output read by three: a residual sum, a gate and a smooth activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv(x))
        return a + torch.sigmoid(a) * F.leaky_relu(self.conv(a), 0.2) + F.gelu(x)


@seeded
def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(*stem, Residual(8), nn.Sequential(Residual(8, 2), Twice()), *head)


@seeded
def plain(pool: bool) -> nn.Module:
    """For images of 16x16, which become 4x4."""
    shrink, stride = ([nn.MaxPool2d(2)], 1) if pool else ([], 2)
    body = [nn.Conv2d(3, 8, 3, stride, 1), nn.ReLU(), *shrink, nn.Conv2d(8, 8, 3, stride, 1), nn.ReLU6(), *shrink]
    return nn.Sequential(*body, nn.Dropout(), nn.Conv2d(8, 4, 1), nn.ELU(), nn.Flatten(), nn.Linear(64, 10))


@seeded
def preact() -> nn.Module:
    block, stem = benchmarks.models.PreActBlock, nn.Conv2d(3, 16, 3, padding=1, bias=False)
    head = [nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(stem, block(16, 16, 1), block(16, 32, 2), block(32, 32, 2), *head)


NETWORKS = {
    "preact": (preact, 7.0),
    "resnet": (lambda: resnet(), 3.0),  # sums, GELU and sigmoid keep theirs
    "pools": (lambda: plain(True), 5.0),
    "no pools": (lambda: plain(False), 5.0),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_exact_and_save_several_times_less(network):
    build, times = NETWORKS[network]
    net = frozen(build())
    x, _ = batch(3, shape=(3, 16, 16))

    def saved() -> int:
        return benchmarks.memory.saved_bytes(net, lambda: net(x.clone().requires_grad_()))

    with signs_only():
        lean = saved()
    assert saved() >= times * lean
    for autocast in (False, True):
        assert_exact(net, x, autocast)
        assert_exact(net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), autocast)
        net.to(memory_format=torch.contiguous_format)
    assert_exact(net.double(), x.double())


def test_preact_resnet18_saves_an_eighth():
    """In MiB an image. What is left is a bool for each element of its ReLUs, 0.53, and the input of its average pool."""
    with torch.random.fork_rng(devices=[]):
        net = frozen(benchmarks.models.preact_resnet18())
    x = batch(2, shape=(3, 32, 32))[0].requires_grad_()
    usual = benchmarks.memory.saved_bytes(net, lambda: net(x))
    with signs_only():
        lean = benchmarks.memory.saved_bytes(net, lambda: net(x))
    assert usual / 2 / 2**20 == pytest.approx(4.26, abs=0.005)
    assert lean / 2 / 2**20 == 0.53125 + 0.03125


def test_no_activation_lives_between_the_passes():
    """The hooks that count see what is saved, not what a closure might hold."""
    net, alive = frozen(plain(True)), []
    for module in net:
        module.register_forward_hook(lambda _, x, y: alive.append((StorageWeakRef(y.untyped_storage()), y.shape)))
    x = batch(2, shape=(3, 16, 16))[0].requires_grad_()
    with signs_only():
        y = net(x)
    assert [shape for storage, shape in alive if not storage.expired()] == [(2, 4, 4, 4), y.shape]  # the first is ELU's input


@pytest.mark.parametrize("bn", fastadv.engine.BN_MODES)
def test_attacks_are_the_same(bn):
    x, y = batch()
    images = []
    for context in (contextlib.nullcontext(), signs_only()):
        torch.manual_seed(0)
        with context:
            images.append(fastadv.pgd(cnn(), x, y, eps=0.03, steps=3, bn=bn))
    assert torch.equal(*images)


def test_nothing_waits_for_the_device():
    net, x = frozen(resnet()), batch(2, shape=(3, 16, 16))[0].requires_grad_()
    with Ops() as ran:
        with signs_only():
            y = net(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert "aten::convolution_backward" in ran.names
    assert not SYNCS.intersection(ran.names)


def test_no_buffer_stands_in_for_an_input_whose_gradient_has_its_layout():
    net = frozen(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    x = image("channels last").requires_grad_()
    with signs_only():
        y = net(x)
    with Ops() as ran:
        torch.autograd.grad(y, x, torch.empty_like(y))
    assert "aten::native_batch_norm_backward" in ran.names
    assert "aten::new_empty_strided" not in ran.names


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_captured_pass_is_the_eager_one(autocast):
    net = frozen(resnet()).cuda()
    x = batch(2, shape=(3, 16, 16))[0].cuda().requires_grad_()
    ones = torch.ones(2, 10, device="cuda")

    def gradient(context) -> Tensor:
        with context, torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            y = net(x).float()
        return torch.autograd.grad(y, x, ones)[0]

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        expected = gradient(contextlib.nullcontext())
        assert torch.equal(gradient(signs_only()), expected)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                gradient(signs_only())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradient(signs_only())
        graph.replay()
        assert torch.equal(captured, expected)


# ---------------------------------------------------------------------------------------- where it would not be exact


def node(y: Tensor) -> str:
    return type(y.grad_fn).__name__


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["conv2d", "batch_norm"])
def test_parameters_that_take_gradients_get_them(layer, trained):
    x = image("contiguous").requires_grad_()
    module = frozen(seeded(LAYERS[layer][1])())
    parameter = getattr(module, trained).requires_grad_()

    def gradients(context) -> tuple[Tensor, ...]:
        with context:
            y = module(x)
        return torch.autograd.grad(y.square().sum(), [x, parameter])

    assert_same(gradients(signs_only()), gradients(contextlib.nullcontext()))


UNTOUCHED = {
    "same, unevenly": lambda x: F.conv2d(x, torch.ones(4, 4, 2, 3), padding="same"),
    "no batch": lambda x: F.conv2d(x[0], torch.ones(4, 4, 3, 3)),
    "statistics of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "updated statistics": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "empty batch": lambda x: F.batch_norm(x[:0], torch.zeros(4), torch.ones(4)),
    "descending": lambda x: F.leaky_relu(x, -0.1),
    **{f.__name__: f for f in (F.gelu, F.silu, F.elu, F.softplus, torch.sigmoid, torch.tanh, F.hardswish)},
    "softmax": lambda x: F.softmax(x, 1),
    "prelu": lambda x: F.prelu(x, torch.full((4,), 0.1)),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "transposed": lambda x: F.conv_transpose2d(x, torch.ones(4, 4, 3, 3)),
    "by keyword": lambda x: torch.relu(input=x),
    "complex": lambda x: F.conv2d(x + 1j * x, torch.full((4, 4, 3, 3), 1 + 2j)),
    "another storage": lambda x: F.relu(x.to_mkldnn()).to_dense(),
}


@pytest.mark.parametrize("op", UNTOUCHED)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_everything_else_is_plain_autograd(op):
    assert_exact(UNTOUCHED[op], image("contiguous"))
    assert "Lean" not in node(run(UNTOUCHED[op], image("contiguous"), signs_only())[0])


def test_no_graph_where_autograd_makes_none():
    x = image("contiguous")
    layer = frozen(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.MaxPool2d(2)))
    with signs_only(), Ops() as ran:
        assert layer(x).grad_fn is None
        x.requires_grad_()
        with torch.no_grad():
            assert layer(x).grad_fn is None
        with torch.inference_mode():
            assert layer(x).grad_fn is None
    assert "aten::_to_copy" not in ran.names  # nor the signs that it would save
    with signs_only():
        assert layer(x).grad_fn is not None


def test_a_view_is_changed_in_place_with_its_base():
    def halves(x: Tensor) -> Tensor:
        y = x * 1
        F.relu(y[:, :2], inplace=True)
        return y

    assert_exact(halves, image("contiguous"))


def test_what_torch_refuses_stays_refused():
    x = image("contiguous").requires_grad_()
    with signs_only():
        with pytest.raises(RuntimeError, match="leaf Variable"):
            F.relu(x, inplace=True)
        y = torch.sigmoid(x)
        F.relu(y, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # sigmoid's backward needs its output
            y.sum().backward()
        with pytest.raises(RuntimeError, match="padding='same' is not supported for strided"):
            F.conv2d(x, torch.ones(4, 4, 3, 3), stride=2, padding="same")
        with pytest.raises(RuntimeError, match="expected input"):
            F.conv2d(x, torch.ones(4, 3, 3, 3))


def test_there_is_no_second_derivative():
    x = image("contiguous").requires_grad_()
    with signs_only():
        y = F.conv2d(x, torch.ones(4, 4, 3, 3)).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class Subclass(Tensor):
    """Counts the ReLUs that reach it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += func is torch.relu
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_have_their_own_way():
    x = image("contiguous").as_subclass(Subclass)
    assert (torch.bool, x.numel()) not in saves(torch.relu, x)
    assert Subclass.calls == 1


def test_ensembles_by_vmap():
    x = batch()[0]
    nets = [frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))) for _ in range(3)]
    state = torch.func.stack_module_state(nets)
    state = tuple({name: t.detach() for name, t in part.items()} for part in state)

    def mean(x: Tensor) -> Tensor:
        return torch.vmap(lambda *state: torch.func.functional_call(nets[0], state, x))(*state).mean(0)

    assert_exact(mean, x)


def test_compiled_models_are_left_to_the_compiler():
    net, x = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))), batch()[0]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert_same(run(compiled, x, signs_only()), run(net, x, contextlib.nullcontext()))
    (graph,) = graphs
    assert "relu" in graph.code
    assert "autograd" not in graph.code


def test_checkpoints_say_that_they_cannot():
    net, x = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), batch()[0]
    with pytest.raises(CheckpointError):
        run(lambda x: checkpoint(net, x, use_reentrant=False), x, signs_only())


def test_a_model_prepared_for_an_attack_is_lean():
    """Parameters that usually take gradients do not, meanwhile."""
    net = cnn().train()
    x = batch()[0].requires_grad_()
    with attacking(net), signs_only():
        lean = benchmarks.memory.saved_bytes(net, lambda: net(x))
        assert "Lean" in node(net[0](x))
    assert lean == len(x) * (6 * 8 * 8 + 8 * 3 * 3)  # a bool for each element of its ReLUs
