"""The ways in which a model may be cut without losing its class, to be tried one after the other."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from graphprune.coupling.branches import outermost
from graphprune.coupling.graph import ModelGraph
from graphprune.cutting import literals
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.exported import literal_changes
from graphprune.cutting.parts import Part, export_parts, holds_node
from graphprune.errors import StepError


@dataclass(frozen=True)
class Route:
    """How a model is cut: as its own class, with (class, attribute) pairs that follow the cut and modules that become
    graphs; or as a graph on the whole.
    """

    own_class: bool = True
    attributes: tuple[tuple[str, str], ...] = ()
    parts: tuple[Part, ...] = ()


def own_routes(model: nn.Module, graph: ModelGraph, cuts: Cuts, inputs: Sequence[torch.Tensor]) -> Iterator[Route]:
    """Routes that keep the model's class: by attributes alone, then with modules as graphs, few before many."""
    choices = list(_attribute_choices(model, graph, cuts))
    for attributes in choices:
        yield Route(attributes=attributes)
    made: dict[str, Part] = {}
    for paths in _part_choices(model, graph, cuts):
        with suppress(StepError):
            missing = [path for path in paths if path not in made]
            made |= {part.path: part for part in export_parts(model, graph, missing, inputs)}
            yield Route(attributes=choices[0], parts=tuple(made[path] for path in paths))


def _attribute_choices(model: nn.Module, graph: ModelGraph, cuts: Cuts) -> Iterator[tuple[tuple[str, str], ...]]:
    """Sets of (class, attribute) to try: all that hold a changed literal, then each smaller set, none last."""
    found: dict[tuple[str, str], None] = {}
    for change in literal_changes(graph, cuts):
        module = model.get_submodule(change[0])
        if not literals.holds_by_name(vars(module), change):
            found |= {(type(module).__name__, name): None for name, _ in literals.holders(vars(module), change)}
    sizes = range(len(found), -1, -1) if len(found) <= 6 else (len(found), 1, 0)
    for size in sizes:
        yield from itertools.combinations(found, size)


def _part_choices(model: nn.Module, graph: ModelGraph, cuts: Cuts) -> Iterator[tuple[str, ...]]:
    """Modules that become graphs: those with a literal out of reach, those of one class, all with literals, and those
    that hold them (torch's transformer layers read the attributes of their attention).
    """
    owners = _owners(model, graph, cuts)
    kinds = {path: type(model.get_submodule(path)) for path in owners}
    choices = [
        [path for path, reached in owners.items() if not reached],
        *([path for path in owners if kinds[path] is kind] for kind in dict.fromkeys(kinds.values())),
        list(owners),
        [path.rpartition(".")[0] for path in owners],
    ]
    summed = [branch.node for branch in outermost(cuts.dropped)]
    for paths in dict.fromkeys(_outermost_paths(choice) for choice in choices):
        if paths and "" not in paths and not any(holds_node(graph, path, summed) for path in paths):
            yield paths


def _owners(model: nn.Module, graph: ModelGraph, cuts: Cuts) -> dict[str, bool]:
    """Paths of modules whose code holds a literal that changes, and whether attributes hold all of these."""
    owners: dict[str, bool] = {}
    for change in literal_changes(graph, cuts):
        attributes = vars(model.get_submodule(change[0]))
        if not literals.holds_by_name(attributes, change):
            owners[change[0]] = owners.get(change[0], True) and literals.reached(attributes, change)
    return owners


def _outermost_paths(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))
