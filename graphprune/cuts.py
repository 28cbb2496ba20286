"""What a plan cuts: kept indices of atoms, kept windows of kernels, dropped branches; nothing of patterns is left."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphprune.axes import Indices
from graphprune.errors import InputError
from graphprune.graph import Branch, Layer, ModelGraph, Window
from graphprune.operators import Absent, Operator
from graphprune.plan import Choice, Plan


@dataclass(frozen=True)
class Cuts:
    """What is cut, wherever it was decided.

    `keep`: atom -> the indices that stay; `windows`: node of a convolution -> the window of its kernel; `dropped`: the
    residual branches that go as a whole, whatever else is cut in them.
    """

    keep: Mapping[int, Indices] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    dropped: tuple[Branch, ...] = ()

    @property
    def sizes(self) -> dict[int, int]:
        """How many indices of each cut atom stay."""
        return {atom: len(indices) for atom, indices in self.keep.items()}

    def drops(self, layer: Layer) -> bool:
        """Whether the layer is inside a branch that goes."""
        return any(layer.node in branch.inside for branch in self.dropped)

    def operator(self, layer: Layer) -> Operator:
        """The operator that a layer becomes."""
        if self.drops(layer):
            return Absent()
        return layer.after(self.sizes, self.windows.get(layer.node))


def join(*cuts: Cuts) -> Cuts:
    """Several cuts at different sites as one."""
    keep = {atom: indices for cut in cuts for atom, indices in cut.keep.items()}
    windows = {node: window for cut in cuts for node, window in cut.windows.items()}
    dropped = tuple(dict.fromkeys(branch for cut in cuts for branch in cut.dropped))
    return Cuts(keep, windows, dropped)


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
    if not choice.keep and site.branch is None:
        raise InputError(f"the choice at {site.name!r} must keep at least one unit")
    if max(choice.keep, default=-1) >= site.size:
        raise InputError(f"{site.name!r} has {site.size} units, the plan keeps number {max(choice.keep)}")
    if site.kind not in pattern(choice.pattern).kinds:
        raise InputError(f"the pattern {choice.pattern!r} does not apply at {site.name!r}, of kind {site.kind!r}")
    return pattern(choice.pattern).rewrite(site, choice.keep)
