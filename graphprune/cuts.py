"""What a plan cuts: kept indices of atoms and kept windows of kernels, with nothing about patterns left in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from graphprune.axes import Indices
from graphprune.errors import InputError
from graphprune.graph import Layer, ModelGraph, Site, Window
from graphprune.operators import Operator
from graphprune.plan import Choice, Plan


@dataclass(frozen=True)
class Cuts:
    """`keep`: atom -> the indices that stay; `windows`: node of a convolution -> the window of its kernel that stays."""

    keep: Mapping[int, Indices] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[int, int]:
        """How many indices of each cut atom stay."""
        return {atom: len(indices) for atom, indices in self.keep.items()}

    def operator(self, layer: Layer) -> Operator:
        """The operator that a layer becomes."""
        return layer.after(self.sizes, self.windows.get(layer.node))


def cut_of(site: Site, keep: tuple[int, ...]) -> Cuts:
    """The cut that keeps some units of a site. Kernel positions must form a rectangle; InputError if not."""
    if max(keep) >= site.size:
        raise InputError(f"{site.name!r} has {site.size} units, the plan keeps number {max(keep)}")
    if site.kind != "kernel":
        return Cuts(keep={site.atom: np.asarray(keep, dtype=np.int64)})
    rows, columns = np.divmod(np.asarray(keep), site.kernel[1])
    window = ((int(rows.min()), int(rows.max()) + 1), (int(columns.min()), int(columns.max()) + 1))
    if (window[0][1] - window[0][0]) * (window[1][1] - window[1][0]) != len(keep):
        raise InputError(f"the kept positions of {site.name!r} are not a rectangle")
    return Cuts(windows={site.node: window})


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
    if choice.site not in graph.site:
        raise InputError(f"this model has no site {choice.site!r}")
    return cut_of(graph.site[choice.site], choice.keep)
