"""Surgery: cutting a copy of the user's own module, checked against the cut exported graph.

Parameters are sliced by name, size attributes follow, and integer attributes that hold a size which the forward
code uses (`num_heads`) are found through the literals of the exported graph. A module whose code holds a literal that
no attribute reaches is replaced by its own exported graph with its literals rewritten; where that is not enough, the
exported graph of the whole model is the result.
"""

import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import nn

from graphprune.coupling.branches import gone_parameters, outermost
from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import copied, first_line, state_of, trace
from graphprune.cutting import literals
from graphprune.cutting.cuts import Cuts, resolve
from graphprune.cutting.division import divided
from graphprune.cutting.exported import cut_part, cut_program, literal_changes
from graphprune.cutting.masked import masked
from graphprune.cutting.routes import Route, own_routes
from graphprune.cutting.switches import with_switches
from graphprune.cutting.window import mixed, windowed
from graphprune.cutting.zeros import Zero
from graphprune.errors import StepError
from graphprune.plan import Plan

if TYPE_CHECKING:
    import onnx

    from graphprune.onnx_files.importing import Source

TOLERANCE = 100
"""How far the module may be from the exported graph: so many rounding steps of the largest output. Both compute the
same operators on the same shapes, so that more is a sign of a literal which did not follow."""
_TRACED: "weakref.WeakKeyDictionary[nn.Module, ModelGraph]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Operation:
    """The outcome of surgery: the pruned module, and the route that led there."""

    model: nn.Module
    route: Route

    @property
    def own_class(self) -> bool:
        """Whether the module is of the user's own class."""
        return self.route.own_class


def remember(model: nn.Module, graph: ModelGraph) -> ModelGraph:
    """Keep the graph of a module for as long as the module lives."""
    _TRACED[model] = graph
    return graph


def graph_of(model: nn.Module, plan: Plan) -> ModelGraph:
    """The graph of a module: the one it was traced to, or a new trace on random inputs of the plan's shapes."""
    known = _TRACED.get(model)
    if known is not None and known.signature == plan.model:
        return known
    return remember(model, trace(model, example_inputs(plan.inputs)))


def example_inputs(inputs: Sequence[tuple[str, tuple[int, ...]]], batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Seeded random inputs of the given dtypes and shapes (without batch axis)."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for dtype, shape in inputs:
        kind: torch.dtype = getattr(torch, dtype)
        if kind.is_floating_point or kind.is_complex:
            tensors.append(torch.randn(batch, *shape, generator=generator).to(kind))
        else:  # zeros and ones: valid as indices too
            tensors.append(torch.randint(2, (batch, *shape), generator=generator).to(kind))
    return tuple(tensors)


@overload
def apply(model: nn.Module, plan: Plan, graph: ModelGraph | None = None) -> nn.Module: ...


@overload
def apply(model: str | Path, plan: Plan, graph: ModelGraph | None = None) -> "onnx.ModelProto": ...


def apply(model: "nn.Module | Source", plan: Plan, graph: ModelGraph | None = None) -> "nn.Module | onnx.ModelProto":
    """A new module in which the plan's structures are gone; `model` is untouched.

    For an ONNX file (its path, or a ModelProto) the result is a ModelProto.

    The result is of the user's own class, with its state dict names, wherever the module's code allows it; otherwise
    it is the exported graph as a module. Without compensation: kept weights have their old values. Raises InputError
    for a plan of another model.
    """
    if not isinstance(model, nn.Module):
        from graphprune.onnx_files.rewriting import cut_file

        return cut_file(model, plan, graph)
    return operate(model, graph or graph_of(model, plan), plan).model


def operate(model: nn.Module, graph: ModelGraph, plan: Plan) -> Operation:
    """`apply`, telling which of the two routes was taken."""
    return perform(model, graph, resolve(graph, plan))


def perform(model: nn.Module, graph: ModelGraph, cuts: Cuts) -> Operation:
    """Make cuts of any kind, patterns or not, and check the result against the cut exported graph."""
    subject = varied(model)
    reference = cut_program(graph, cuts, subject)
    inputs = inputs_like(model, graph)
    try:
        expected = _outputs(reference, inputs)
    except Exception as error:
        raise StepError(f"the network does not run after this cut: {first_line(error)}") from error
    for route in own_routes(model, graph, cuts, inputs):
        if _agree(cut_module(subject, graph, cuts, route), expected, inputs):
            return Operation(cut_module(model, graph, cuts, route), route)
    route = Route(own_class=False)
    return Operation(cut_along(model, graph, cuts, route), route)


def cut_along(model: nn.Module, graph: ModelGraph, cuts: Cuts, route: Route) -> nn.Module:
    """Cut a copy along a route that is known, unchecked."""
    if route.own_class:
        return cut_module(model, graph, cuts, route)
    return with_switches(cut_program(graph, cuts, model)).train(model.training)


def varied(model: nn.Module) -> nn.Module:
    """A copy whose constant parameters are random: one that starts at zero would hide from a check what was cut."""
    subject = copied(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in subject.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            parameter.data = parameter.data + 0.1 * noise
    return subject


def _with_modes_of(model: nn.Module, pruned: nn.Module) -> nn.Module:
    """The pruned module with each part in the mode (training or not) that it has in `model`."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in pruned.named_modules():
        module.training = modes.get(name, model.training)
    return pruned


def inputs_like(model: nn.Module, graph: ModelGraph) -> tuple[torch.Tensor, ...]:
    """Seeded random inputs of batch 2 on the model's device, in its floating-point type."""
    kinds = [(p.device, p.dtype) for p in model.parameters() if p.is_floating_point()]
    device, dtype = kinds[0] if kinds else (torch.device("cpu"), torch.float32)
    inputs = (x.to(device) for x in example_inputs(graph.inputs))
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def cut_module(model: nn.Module, graph: ModelGraph, cuts: Cuts, route: Route) -> nn.Module:
    """Cut a copy of the module itself."""
    pruned = copied(model).train()  # modules that cache tensors of the old size in eval mode drop them
    for node, window in cuts.windows.items():
        path = graph.layer[node].module
        pruned.set_submodule(path, windowed(pruned.get_submodule(path), window))  # type: ignore[arg-type]
    for node, mask in cuts.masks.items():
        path = graph.layer[node].module
        pruned.set_submodule(path, masked(pruned.get_submodule(path), mask))  # type: ignore[arg-type]
    _slice_parameters(pruned, graph, cuts)
    for node in cuts.mixes:
        layer = graph.layer[node]
        conv = pruned.get_submodule(layer.module)
        pruned.set_submodule(layer.module, mixed(conv, cuts.runs(layer)))  # type: ignore[arg-type]
    for node in cuts.groups:
        layer = graph.layer[node]
        whole = pruned.get_submodule(layer.module)
        pruned.set_submodule(layer.module, divided(whole, cuts.group_count(layer)))  # type: ignore[arg-type]
    _follow_literals(pruned, graph, cuts, frozenset(route.attributes))
    for part in route.parts:
        pruned.set_submodule(part.path, with_switches(cut_part(part, graph, cuts, model)))
    _drop_branches(pruned, graph, cuts)
    return _with_modes_of(model, pruned)


def _slice_parameters(pruned: nn.Module, graph: ModelGraph, cuts: Cuts) -> None:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    state = state_of(pruned)
    for module in pruned.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None:
                    owners.setdefault(id(value), []).append((module, name))
    for parameter in graph.parameters:
        value = state[parameter.name]
        touched = [axis for axis, form in enumerate(parameter.axes) if form.atoms() & cuts.kept.keys()]
        if not touched or id(value) not in owners:
            continue
        small = value.detach()
        for axis in touched:
            index = torch.from_numpy(parameter.axes[axis].kept(cuts.kept)).to(value.device)
            small = small.index_select(axis, index)
        small = nn.Parameter(small, value.requires_grad) if isinstance(value, nn.Parameter) else small
        for module, attribute in owners.pop(id(value)):
            setattr(module, attribute, small)
            _follow_sizes(module)


def _follow_sizes(module: nn.Module) -> None:
    """The size attributes of torch's own layers, from the shape of the weight."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        sized = weight if weight is not None else getattr(module, "running_mean", None)
        name = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
        if sized is not None:
            setattr(module, name, sized.shape[0])


def _follow_literals(pruned: nn.Module, graph: ModelGraph, cuts: Cuts, attributes: frozenset[tuple[str, str]]) -> None:
    originals: dict[str, dict[str, object]] = {}
    for change in literal_changes(graph, cuts):
        path, name, _, after = change
        module = pruned.get_submodule(path)
        original = originals.setdefault(path, dict(vars(module)))
        if literals.holds_by_name(original, change):
            setattr(module, name, type(original[name])(after))  # type: ignore[call-arg]
            _follow_sizes(module)
            continue
        for attribute, value in literals.holders(original, change):
            if (type(module).__name__, attribute) in attributes:
                setattr(module, attribute, value)


def _drop_branches(pruned: nn.Module, graph: ModelGraph, cuts: Cuts) -> None:
    """Nothing is left of a branch but zeros; parameters that other modules hold for it become None."""
    for branch in outermost(cuts.dropped):
        for path in branch.modules:
            pruned.set_submodule(path, Zero())
    for name in gone_parameters(graph, cuts.dropped):
        path, _, attribute = name.rpartition(".")
        with suppress(AttributeError):  # gone already, with the module that held it
            owner = pruned.get_submodule(path)
            store = owner._parameters if attribute in owner._parameters else owner._buffers
            if attribute in store:
                store[attribute] = None


def _agree(pruned: nn.Module, expected: list[torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> bool:
    try:
        got = _outputs(pruned, inputs)
    except Exception:  # whatever the module's own code raises when its literals do not fit
        return False
    return len(got) == len(expected) and all(map(_close, got, expected))


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE * torch.finfo(expected.dtype).eps * scale)


def _outputs(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(module.eval()(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
