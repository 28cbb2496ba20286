"""Parts: modules of a network that are exported on their own, where their code holds a size that nothing reaches."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import export, fresh_copy, module_paths, state_of
from graphprune.errors import StepError


@dataclass(frozen=True)
class Part:
    """A module and its exported graph; `nodes` gives for each of its nodes in the whole graph the one in its own."""

    path: str
    program: torch.export.ExportedProgram = field(compare=False, repr=False)
    nodes: Mapping[str, str] = field(compare=False, repr=False)


def export_parts(
    model: nn.Module, graph: ModelGraph, paths: Sequence[str], inputs: Sequence[torch.Tensor]
) -> list[Part]:
    """Export the modules at some paths, each for the call that the model makes with these inputs.

    Raises StepError for a module that is not called just once, that cannot be exported on its own, or does something
    else on its own than in the model.
    """
    calls, structures = _calls(fresh_copy(model), paths, inputs)
    programs: dict[Hashable, torch.export.ExportedProgram] = {}
    parts = []
    for path in paths:
        if len(calls[path]) != 1:
            raise StepError(f"{path!r} is called {len(calls[path])} times")
        whole = [node for node in graph.exported.graph.nodes if _computes(node) and _inside(node, path)]
        same = (_tensors_of(model.get_submodule(path)), structures[path], _fingerprint(graph, whole, path))
        if same not in programs:
            programs[same] = export(fresh_copy(model.get_submodule(path)), *calls[path][0])
        parts.append(_part(path, whole, programs[same]))
        if not set(programs[same].constants) <= dict(model.get_submodule(path).named_buffers()).keys():
            del programs[same]  # it holds values that may be another module's
    return parts


def holds_node(graph: ModelGraph, path: str, names: Sequence[str]) -> bool:
    """Whether some of these nodes are calls made within the module at a path."""
    return bool(names) and any(node.name in names and _inside(node, path) for node in graph.exported.graph.nodes)


def _part(path: str, whole: Sequence[fx.Node], program: torch.export.ExportedProgram) -> Part:
    own = [node for node in program.graph.nodes if _computes(node)]
    if [node.target for node in whole] != [node.target for node in own]:
        raise StepError(f"{path!r} on its own is another graph than within the model")
    return Part(path, program, {there.name: here.name for there, here in zip(whole, own, strict=True)})


def _tensors_of(module: nn.Module) -> Hashable:
    """Name, shape and type of all that a module holds."""
    return tuple((name, tuple(value.shape), value.dtype) for name, value in state_of(module).items())


def _fingerprint(graph: ModelGraph, nodes: Sequence[fx.Node], path: str) -> Hashable:
    """Equal for modules whose calls are the same, on tensors of the same shapes and of the same names within them."""
    signature = graph.exported.graph_signature
    tensors = signature.inputs_to_parameters | signature.inputs_to_buffers
    known = {node: f"%{number}" for number, node in enumerate(nodes)}

    def told(x: fx.Node) -> str:
        if x.name in tensors:
            known.setdefault(x, tensors[x.name].removeprefix(f"{path}."))
        value = x.meta.get("val")
        return known.setdefault(x, f"%outer {len(known)}") + str(getattr(value, "shape", value))

    inner = set(nodes)
    return tuple(
        (str(n.target), str(fx.node.map_arg((n.args, n.kwargs), told)), told(n), n.users.keys() <= inner) for n in nodes
    )


def _calls(
    model: nn.Module, paths: Sequence[str], inputs: Sequence[torch.Tensor]
) -> tuple[dict[str, list[tuple[Any, Any]]], dict[str, str]]:
    """Arguments (positional, named) of each call of the modules at some paths; what goes in and out but tensors."""
    calls: dict[str, list[tuple[Any, Any]]] = {path: [] for path in paths}
    structures = dict.fromkeys(paths, "")

    def before(path: str) -> Any:
        def hook(_: nn.Module, given: Any, named: Any) -> None:
            calls[path].append(tree_map_only(torch.Tensor, torch.clone, (given, named)))

        return hook

    def after(path: str) -> Any:
        def hook(_: nn.Module, given: Any, output: Any) -> None:
            structures[path] = str(tree_map_only(torch.Tensor, lambda x: None, (calls[path][-1], output)))

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(before(path), with_kwargs=True)
        model.get_submodule(path).register_forward_hook(after(path))
    with torch.no_grad():
        model(*inputs)
    return calls, structures


def _computes(node: fx.Node) -> bool:
    """An operator on tensors: no arithmetic of sizes, no check, and no part of a tuple."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))


def _inside(node: fx.Node, path: str) -> bool:
    return any(own == path or own.startswith(f"{path}.") for own in module_paths(node))
