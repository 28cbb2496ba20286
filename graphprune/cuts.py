"""What a plan cuts: kept indices of atoms and kept windows of kernels, with nothing about patterns left in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphprune.axes import Indices
from graphprune.errors import InputError
from graphprune.graph import Layer, ModelGraph, Window
from graphprune.operators import Operator
from graphprune.plan import Choice, Plan


@dataclass(frozen=True)
class Cuts:
    """`keep`: atom -> the indices that stay; `windows`: node of a convolution -> the window of its kernel."""

    keep: Mapping[int, Indices] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[int, int]:
        """How many indices of each cut atom stay."""
        return {atom: len(indices) for atom, indices in self.keep.items()}

    def operator(self, layer: Layer) -> Operator:
        """The operator that a layer becomes."""
        return layer.after(self.sizes, self.windows.get(layer.node))


def join(*cuts: Cuts) -> Cuts:
    """Several cuts at different sites as one."""
    keep = {atom: indices for cut in cuts for atom, indices in cut.keep.items()}
    windows = {node: window for cut in cuts for node, window in cut.windows.items()}
    return Cuts(keep, windows)


def resolve(graph: ModelGraph, plan: Plan) -> Cuts:
    """What a plan cuts in this graph. Raises InputError for a plan of another model."""
    if plan.model != graph.signature:
        raise InputError(f"the plan was made for another model (it names {plan.model}, this one is {graph.signature})")
    return join(*(_resolve_choice(graph, choice) for choice in plan.choices))


def _resolve_choice(graph: ModelGraph, choice: Choice) -> Cuts:
    from graphprune.registry import pattern

    site = graph.site.get(choice.site)
    if site is None:
        raise InputError(f"this model has no site {choice.site!r}")
    if max(choice.keep) >= site.size:
        raise InputError(f"{site.name!r} has {site.size} units, the plan keeps number {max(choice.keep)}")
    if site.kind not in pattern(choice.pattern).kinds:
        raise InputError(f"the pattern {choice.pattern!r} does not apply at {site.name!r}, of kind {site.kind!r}")
    return pattern(choice.pattern).rewrite(site, choice.keep)
