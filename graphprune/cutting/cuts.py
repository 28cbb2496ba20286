"""What a plan cuts: kept indices of atoms, kept windows of kernels, dropped branches; nothing of patterns is left."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from graphprune.coupling.axes import Indices
from graphprune.coupling.graph import Branch, Layer, ModelGraph, Patch, Window, group_patches
from graphprune.coupling.operators import Absent, Convolution, Masked, Mixture, Operator, Weighted
from graphprune.errors import InputError
from graphprune.plan import Choice, Plan

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Cuts:
    """What is cut, wherever it was decided.

    `keep`: atom -> the indices that stay; `windows`: node of a convolution -> the window of its kernel; `dropped`: the
    residual branches that go as a whole, whatever else is cut in them; `mixes`: node of a convolution -> a window for
    each of its dense filters; `groups`: node of a convolution or linear layer -> for each of its dense filters (a
    linear layer's outputs) the group it is in, and so which channels it reads; `masks`: node of a linear layer or 1x1
    convolution -> which weights [outputs, inputs] stay, 2 in each 4 consecutive inputs, while the others become zero;
    `order`: atom -> all its indices, so ordered that filters of one window or group stand together.
    """

    keep: Mapping[int, Indices] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    dropped: tuple[Branch, ...] = ()
    mixes: Mapping[str, tuple[Window, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    order: Mapping[int, Indices] = field(default_factory=dict)

    @cached_property
    def kept(self) -> dict[int, Indices]:
        """What stays of each atom that is cut or put in another order, in the order in which it stays."""
        ordered = {
            atom: order[np.isin(order, self.keep[atom])] if atom in self.keep else order
            for atom, order in self.order.items()
        }
        return {**self.keep, **ordered}

    @property
    def sizes(self) -> dict[int, int]:
        """How many indices of each cut atom stay."""
        return {atom: len(indices) for atom, indices in self.keep.items()}

    def drops(self, layer: Layer) -> bool:
        """Whether the layer is inside a branch that goes."""
        return any(layer.node in branch.inside for branch in self.dropped)

    def runs(self, layer: Layer) -> list[tuple[Window, int]]:
        """The windows of a mixed convolution, and how many of its kept filters in a row have each."""
        windows = self.mixes[layer.node]
        return [
            (window, len(list(same))) for window, same in groupby(windows[i] for i in layer.outputs.kept(self.kept))
        ]

    def patches(self, layer: Layer) -> tuple[Patch, ...]:
        """What each dense filter of a layer keeps, where they differ; else nothing."""
        operator = layer.operator
        assert isinstance(operator, Weighted)
        if layer.node in self.groups:
            patches = group_patches(operator.kernel, operator.inputs, self.group_count(layer))
            return tuple(patches[own] for own in self.groups[layer.node])
        return tuple((*window, (0, operator.inputs)) for window in self.mixes.get(layer.node, ()))

    def group_count(self, layer: Layer) -> int:
        """Into how many groups a layer is divided."""
        return max(self.groups[layer.node]) + 1

    @property
    def rigid(self) -> frozenset[str]:
        """The layers that must keep their channels, in place, and their filters: those with groups or a mask."""
        return frozenset({*self.groups, *self.masks})

    def disturbs(self, layer: Layer) -> bool:
        """Whether the layer cannot have groups or a mask beside these cuts: its channels are cut or moved, or its
        filters cut.
        """
        return bool((layer.inputs.atoms() & self.kept.keys()) | (layer.outputs.atoms() & self.keep.keys()))

    def fits(self, layer: Layer) -> bool:
        """Whether all cuts of a layer go together."""
        return layer.node not in self.rigid or not self.disturbs(layer)

    def operator(self, layer: Layer) -> Operator:
        """The operator that a layer becomes."""
        if self.drops(layer):
            return Absent()
        whole = layer.after(self.sizes, self.windows.get(layer.node))
        if isinstance(whole, Weighted) and layer.node in self.masks:
            return Masked(whole)
        if isinstance(whole, Weighted) and layer.node in self.groups:
            return replace(whole, groups=self.group_count(layer))
        if not isinstance(whole, Convolution) or layer.node not in self.mixes:
            return whole
        return Mixture(tuple(replace(whole, outputs=n).window(*window) for window, n in self.runs(layer)))


def join(*cuts: Cuts) -> Cuts:
    """Several cuts at different sites as one."""
    dropped = tuple(dict.fromkeys(branch for cut in cuts for branch in cut.dropped))
    gone = frozenset().union(*(branch.inside for branch in dropped))  # which has no other change
    return Cuts(
        keep=_together(cut.keep for cut in cuts),
        windows=_together(cut.windows for cut in cuts),
        dropped=dropped,
        mixes=_together((cut.mixes for cut in cuts), gone),
        groups=_together((cut.groups for cut in cuts), gone),
        masks=_together((cut.masks for cut in cuts), gone),
        order=_together(cut.order for cut in cuts),
    )


def _together(maps: Iterable[Mapping[Key, Value]], gone: Collection[str] = ()) -> dict[Key, Value]:
    return {key: value for one in maps for key, value in one.items() if key not in gone}


def resolve(graph: ModelGraph, plan: Plan) -> Cuts:
    """What a plan cuts in this graph. Raises InputError for a plan of another model, or cuts that exclude another."""
    if plan.model != graph.signature:
        raise InputError(f"the plan was made for another model (it names {plan.model}, this one is {graph.signature})")
    return checked(graph, join(*(_resolve_choice(graph, choice) for choice in plan.choices)))


def checked(graph: ModelGraph, cuts: Cuts) -> Cuts:
    """The cuts themselves. Raises InputError where one excludes another."""
    for node in cuts.rigid:
        if not cuts.fits(layer := graph.layer[node]):
            change = "divided into groups" if node in cuts.groups else "masked"
            why = "what it reads is cut or moved, or filters are cut"
            raise InputError(f"{layer.module!r} cannot be {change}: {why}")
    return cuts


def _resolve_choice(graph: ModelGraph, choice: Choice) -> Cuts:
    from graphprune.registry import pattern

    site = graph.site.get(choice.site)
    if site is None:
        raise InputError(f"this model has no site {choice.site!r}")
    chosen = pattern(choice.pattern)
    if site.kind not in chosen.kinds:
        raise InputError(f"the pattern {choice.pattern!r} does not apply at {site.name!r}, of kind {site.kind!r}")
    if not choice.keep and site.branch is None:
        raise InputError(f"the choice at {site.name!r} must keep at least one unit")
    if max(choice.keep, default=-1) >= chosen.units(site):
        raise InputError(f"{site.name!r} has {chosen.units(site)} units, the plan keeps number {max(choice.keep)}")
    return chosen.rewrite(site, choice.keep)
