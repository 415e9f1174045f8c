"""The frozen twin: a copy of a model that exists only to be attacked in eval mode, and is cheaper to run than the model.

Batch norms that follow a convolution or a linear layer are folded into it, convolutions over images are in channels_last, thin
ones take their input gradients by another way on a CPU, and weights are in the precision that autocast would cast them to in
each forward. A model is refused where its copy might not compute what it does, now and after every :meth:`Twin.refresh`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections import Counter, defaultdict
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from ..normalize import Normalize
from .guest import Model, attacking
from .thin import ThinConv2d, is_thin

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
WRAPPERS = ("torch._dynamo", "torch.jit", "torch.nn.parallel", "torch.distributed")  # the homes of their classes
HALF = (torch.bfloat16, torch.float16)

logger = logging.getLogger("fastadv")


class TwinError(Exception):
    """This model can have no twin; the message says where in it ("model.layer1.0.conv1") and why."""


class Twin:
    """A frozen twin of ``model``. It is made of copies: the two share no tensor and no module.

    Args:
        model: maps a batch [N, ...] to logits [N, C]. Left as it was found.
        dtype: torch.bfloat16 or torch.float16: the twin will run under torch.autocast of this dtype, with cache_enabled=False.
            None: it will run as the model does.

    Attributes:
        module: the twin, in eval mode; no parameter requires grad. Its tensors never move in memory.

    Raises:
        TwinError: ``model`` is not an nn.Module that torch.fx can trace, or has something that a trace loses.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._root, self._dtype = _Root(model), dtype
        _refuse_wrapped(self._root)
        self._traits = _model_traits(self._root)
        with torch.inference_mode(False), torch.enable_grad():  # as in an attack; and an inference tensor could not be in one
            root = _copy_in_eval_mode(self._root)  # to trace is to run forward, and whatever that leaves behind stays there
            graph = _trace(root)
            self._folds = _fold(graph, root)
            self.module = fx.GraphModule(root, graph).eval()
            self._copies: dict[str, Tensor] = {}  # the twin's tensors but those of folds, by their names in the model
            self._allocate(_read(graph))
            if dtype is None:
                for module in filter(is_thin, self.module.modules()):
                    module.__class__ = ThinConv2d
        self.refresh()

    def _allocate(self, read: set[str]) -> None:
        """Gives each module of the twin tensors of its own, also where the model ties them: casts and folds part them."""
        for path, module in self.module.named_modules():
            is_layer = type(module) in LAYERS
            for name, tensor in _tensors(module).items():
                cast = is_layer and path not in read and tensor.dtype == torch.float32  # all that autocast casts
                own = torch.empty_like(
                    tensor,
                    dtype=self._dtype if cast else None,
                    memory_format=torch.channels_last if is_layer and tensor.dim() == 4 else torch.preserve_format,
                    requires_grad=False,
                )
                setattr(module, name, nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own)
                if path not in self._folds:
                    self._copies[f"{path}.{name}"] = own

    @torch.no_grad()
    def refresh(self) -> None:
        """Gives the twin the model's present weights and statistics, in place. Only where it :meth:`fits`.

        All of them, each time. Version counters would not tell which have changed: fused optimisers and writes to ``.data``
        leave them alone, so a twin that trusted them would be attacked at stale weights, in silence. And there is little to
        save: this passes over the weights once, where an attack passes over them 20 times with a batch.
        """
        for layer, norm in self._folds.items():
            _fold_into(self.module.get_submodule(layer), self._root.get_submodule(layer), self._root.get_submodule(norm))
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))  # what one kernel can copy
        for name, ours in self._copies.items():
            theirs = attrgetter(name)(self._root)
            own, present = alike[ours.device, ours.dtype, theirs.dtype, ours.stride() == theirs.stride()]
            own.append(ours)
            present.append(theirs)
        for own, present in alike.values():
            torch._foreach_copy_(own, present)
        for module in self.module.modules():
            if isinstance(module, ThinConv2d):
                module.refresh()

    def fits(self, model: nn.Module) -> bool:
        """Whether this is the model that the twin was made of, and only values of tensors have changed in it since.

        Same modules, with tensors of the same shapes, dtypes and devices, and with the same attributes: a trace keeps numbers,
        strings and functions as they were. So a counter in forward makes the twin of the step before unfit.
        """
        return model is self._root.model and _model_traits(self._root) == self._traits

    def forward(self, x: Tensor) -> Model:
        """The twin with its present weights, for many forward passes without gradients on batches like x.

        On a CPU, in the model's own precision, oneDNN fuses convolutions with what follows them. By TorchScript, which torch
        means to drop: without it, or where it fails, the twin as it is.
        """
        if x.device.type != "cpu" or self._dtype is not None:
            return self.module
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", DeprecationWarning)
                frozen = torch.jit.freeze(torch.jit.trace(self.module, x, check_trace=False))  # type: ignore[no-untyped-call]
                fused: Model = torch.jit.optimize_for_inference(frozen)
                self.check(x, fused)
        except Exception as reason:
            logger.info("the twin's convolutions are not fused: %s", _one_line(reason))
            return self.module
        return fused

    def check(self, x: Tensor, program: Model | None = None) -> None:
        """Runs model, in eval mode, and twin (or its ``program``) on a batch: the last resort against what tracing may lose.

        Raises:
            TwinError: their logits differ by more than rounding.
        """
        autocast = torch.autocast(x.device.type, self._dtype, cache_enabled=False) if self._dtype else contextlib.nullcontext()
        with attacking(self._root.model), torch.no_grad(), autocast:
            theirs = self._root(x)
            try:
                ours = (program or self.module)(x)
                apart, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
            except Exception as error:
                raise TwinError(f"model: its twin fails where it does not: {_one_line(error)}") from error
            half = torch.is_autocast_enabled(x.device.type) or any(p.dtype in HALF for p in self.module.parameters())
        tolerance = 5e-2 if half else 1e-4 if x.device.type == "cpu" else 1e-2  # TF32 is what GPUs compute float32 in
        if not apart <= tolerance * size:
            raise TwinError(f"model: its logits, up to {size:.3g}, and its twin's differ by {apart:.3g}: is it random?")


class _Root(nn.Module):
    """Calls the model with x alone, so that other arguments have their defaults in a trace and are not its inputs.

    It also lets a model that is a single layer be one, and gives every module a name to show: "model.layer1.0.conv1".
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TwinError(f"model: a {type(model).__name__} is not an nn.Module")
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------- what the model looks like


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, by name."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _refuse_wrapped(root: nn.Module) -> None:
    """Raises TwinError if a call of some module does more, or else, than its class's forward with its own tensors."""
    for path, m in root.named_modules():
        if type(m).__module__.startswith(WRAPPERS):
            raise TwinError(f"{path}: a {type(m).__name__} cannot be copied; attack the module inside it")
        if parametrize.is_parametrized(m):
            raise TwinError(f"{path}: it is parametrized (torch.nn.utils.parametrize)")
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            raise TwinError(f"{path}: it has hooks, which tracing loses")
        if "forward" in vars(m):
            raise TwinError(f"{path}: its forward is not its class's, but was replaced")
        for name, tensor in _tensors(m).items():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise TwinError(f"{path}.{name}: a {type(tensor).__name__} is not an ordinary tensor")


def _model_traits(root: nn.Module) -> object:
    """What a twin of the model depends on, apart from the values of tensors; comparable."""
    tied = [[name for name, _ in tensors] for tensors in (root.named_parameters(), root.named_buffers())]  # each once
    return tied, {path: (type(m), _traits(vars(m))) for path, m in root.named_modules()}


def _traits(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return {k: _traits(v) for k, v in value.items() if k != "training"}
    if isinstance(value, list | tuple):
        return [_traits(v) for v in value]
    return type(value) if type(value).__hash__ is None else value  # what can be hashed has an equality that can be trusted


# ------------------------------------------------------------------------------------------------------------ the trace


def _copy_in_eval_mode(root: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(root)
    except Exception as error:
        raise TwinError(f"model: it cannot be copied: {_one_line(error)}") from error
    for m in copied.modules():
        m.training = False  # not by .eval(), which some models override
    return copied


def _trace(root: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        with _NothingComputed():  # type: ignore[no-untyped-call]
            return tracer.trace(root)
    except Exception as error:
        inside = [path for path, _ in tracer.module_stack.values()] or ["model"]
        reason = str(error) if isinstance(error, TwinError) else f"it cannot be traced: {_one_line(error)}"
        raise TwinError(f"{inside[-1]}: {reason}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _Tracer(fx.Tracer):
    """Records what forward does with x and with tensors that have a name in the model, and refuses what it cannot record."""

    proxy_buffer_attributes = True  # an op on a buffer is recorded, not computed

    def __init__(self) -> None:
        super().__init__()
        self.nesting = _autocast_nesting()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m) is Normalize  # which looks at the shape of x before it computes
        return ours or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, kind: str, target: fx.node.Target, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise TwinError("it computes under torch.no_grad or in an autograd.Function, which tracing loses")
        if _autocast_nesting() != self.nesting:
            raise TwinError("it computes under a torch.autocast of its own, which tracing loses")
        if kind == "get_attr" and not str(target).startswith("model."):
            raise TwinError("it uses a tensor that is no parameter, buffer or attribute of it, so could not be refreshed")
        return super().create_node(kind, target, *args, **kwargs)


class _NothingComputed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every op on actual tensors: tracing would keep its result, whatever became of what it was computed from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TwinError(f"it calls {func} on tensors that are not x, parameters or buffers, whose result tracing would keep")


def _autocast_nesting() -> int:
    """How many autocast contexts this is in, enabled or not."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


# ---------------------------------------------------------------------------------------------------------- the folding


def _fold(graph: fx.Graph, root: nn.Module) -> dict[str, str]:
    """Takes norms out of the graph that their layers can do the work of. Returns the names: of layers, to those of norms."""
    nodes = graph.find_nodes(op="call_module")
    calls = Counter(node.target for node in nodes)
    read = _read(graph)
    folds: dict[str, str] = {}
    for node in nodes:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer_name, norm_name = str(source.target), str(node.target)
        if calls[layer_name] > 1 or calls[norm_name] > 1 or layer_name in read:
            continue
        layer, norm = root.get_submodule(layer_name), root.get_submodule(norm_name)
        linear = type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d and layer.out_features == norm.num_features
        conv = type(layer) in (*CONVS, *TRANSPOSED) and type(norm) in NORMS
        if not (linear or conv) or norm.running_mean is None:
            continue
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_empty(norm.num_features))
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(_matrix, (source,)) if linear else source)
        graph.erase_node(node)
        folds[layer_name] = norm_name
    return folds


def _read(graph: fx.Graph) -> set[str]:
    """Names of modules with tensors that some forward reads by itself: there they have to be as in the model."""
    return {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}


def _matrix(features: Tensor) -> Tensor:
    """What a batch norm folded into a linear layer was fed; of [N, L, F] it would have normalised L, where the layer has F."""
    if features.dim() != 2:
        raise TwinError(f"a batch norm after a linear layer can be folded for [N, F] only; got {list(features.shape)}")
    return features


def _fold_into(out: Any, layer: Any, norm: Any) -> None:
    """Makes ``out`` compute ``norm(layer(x))``: w' = s w and b' = s (b - mean) + beta, with s = gamma / sqrt(var + eps).

    In float32, or wider where the model is, whatever ``out`` is kept in.
    """
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean * scale if layer.bias is None else (layer.bias - norm.running_mean) * scale
    out.bias.copy_(bias if norm.bias is None else bias + norm.bias)
    per_weight = scale.view(-1, *[1] * (layer.weight.dim() - 1))  # [out, in / groups, ...]
    if type(layer) in TRANSPOSED:  # [in, out / groups, ...]: each group's inputs lead to its outputs
        per_group = scale.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, 0)
        per_weight = per_group.view(*per_group.shape, *[1] * (layer.weight.dim() - 2))
    torch.mul(layer.weight, per_weight, out=out.weight)  # which rounds once, as it is written
