"""The model graph: operators, tensors, the groups of axes that are cut together, and the sites of decisions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graphprune.coupling.axes import Form
from graphprune.coupling.operators import Attention, Convolution, Linear, Operator

if TYPE_CHECKING:
    import networkx
    from torch_geometric.data import Data

    from graphprune.reporting.tables import GroupTable, SiteTable
    from graphprune.timing.profile import Profile

Window = tuple[tuple[int, int], tuple[int, int]]
"""Kept rows [start, stop) and columns [start, stop) of a kernel."""

Patch = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Rows, columns and input channels [start, stop) that a filter keeps; those of a linear layer have a 1x1 kernel."""


def group_patches(kernel: tuple[int, int], channels: int, groups: int) -> tuple[Patch, ...]:
    """What the filters of each group of a layer keep: the whole kernel of their share of the channels."""
    rows, columns = kernel
    size = channels // groups
    return tuple(((0, rows), (0, columns), (group * size, (group + 1) * size)) for group in range(groups))


@dataclass(frozen=True)
class Node:
    """One operator call: `op` is its ATen name, `module` the path of the module whose code called it.

    `inputs` names the nodes and parameters it reads, `shape` is that of its first output at batch 1.
    """

    name: str
    op: str
    module: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[Form, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer by its name in the state dict."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Form, ...]


@dataclass(frozen=True)
class Layer:
    """A node that costs time: a convolution, a linear layer, or an attention product (which has no weight)."""

    node: str
    module: str
    weight: str
    inputs: Form
    outputs: Form
    groups: Form | None
    operator: Operator
    standard: bool = False
    """The owning module is a plain torch layer, so that it may be replaced by another with the same meaning."""
    widths: tuple[Form, Form] | None = None
    """The width of an attention product's queries, and that of its values."""

    def after(self, sizes: Mapping[int, int], window: Window | None = None) -> Operator:
        """The operator when atom `a` keeps `sizes[a]` units and the kernel keeps a window."""
        given = self.operator
        inputs, outputs = self.inputs.kept_size(sizes), self.outputs.kept_size(sizes)
        if isinstance(given, Convolution):
            groups = self.groups.kept_size(sizes) if self.groups else 1
            cut = replace(given, inputs=inputs, outputs=outputs, groups=groups)
            return cut.window(*window) if window else cut
        if isinstance(given, Linear):
            return replace(given, inputs=inputs, outputs=outputs)
        if isinstance(given, Attention) and self.widths:
            width, value_width = (form.kept_size(sizes) for form in self.widths)
            return replace(given, heads=inputs, width=width, value_width=value_width)
        return given


@dataclass(frozen=True)
class Member:
    """One axis of one parameter that a group runs through; a unit of the group is `rows` of its indices."""

    parameter: str
    axis: int
    rows: int


@dataclass(frozen=True)
class Group:
    """Axes that are cut together. `frozen` says why nothing may be cut, empty where it may.

    `unit` is how many rows of a layer's weight one unit takes (one head = 64 rows).
    """

    atom: int
    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: tuple[str, ...]
    unit: int


@dataclass(frozen=True)
class Branch:
    """A residual branch: `node` adds what is `inside`, which is computed from `skip` alone, to `skip`.

    `inside` names all nodes of the exported graph that vanish with it, `modules` the paths of the largest modules that
    lie wholly inside. `name` is the path that tells best what it is.
    """

    name: str
    node: str
    skip: str
    inside: frozenset[str]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """Where one decision is taken: `size` units of a group, positions of a kernel, or a branch (a single unit).

    `layers` are the nodes of the layers whose cost the decision changes; `node` is where agents see it. At a kernel,
    `order` is the group of the layer's `filters` where they may stand in any order, -1 where they may not; `channels`
    is how many each of them reads. A linear layer's kernel is 1x1, and its outputs are its filters.
    """

    name: str
    kind: str
    size: int
    layers: tuple[str, ...]
    node: str
    atom: int = -1
    kernel: tuple[int, int] = (0, 0)
    unit: int = 1
    order: int = -1
    filters: int = 0
    channels: int = 0
    branch: Branch | None = None


@dataclass(frozen=True)
class ModelGraph:
    """A traced model. A value: it is never changed, and equal models give equal graphs.

    `inputs` are the dtype and the shape, without the batch axis, of each input.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...]
    atom_sizes: tuple[int, ...]
    atom_frozen: tuple[tuple[str, ...], ...]
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    exported: Any = field(default=None, compare=False, repr=False)
    calls: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """For surgery on the exported graph: the exported program and its operator calls, with finished axes."""

    @cached_property
    def signature(self) -> str:
        """A hash of parameter names and shapes and of the input shapes: a plan belongs to one signature."""
        facts = [[p.name, p.shape] for p in sorted(self.parameters, key=lambda p: p.name)]
        text = json.dumps([facts, self.inputs])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def layer(self) -> Mapping[str, Layer]:
        """Layers by the name of their node."""
        return {layer.node: layer for layer in self.layers}

    @cached_property
    def spans(self) -> Mapping[int, list[tuple[Parameter, int]]]:
        """The parameters that each atom runs through, and along which axis."""
        found: dict[int, list[tuple[Parameter, int]]] = {}
        for parameter in self.parameters:
            for axis, form in enumerate(parameter.axes):
                for atom in form.atoms():
                    found.setdefault(atom, []).append((parameter, axis))
        return found

    @cached_property
    def all_groups(self) -> tuple[Group, ...]:
        """Every group with a parameter in it, frozen ones too, in the order of the graph."""
        from graphprune.coupling.grouping import find_groups

        return find_groups(self)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """Residual branches that can be dropped whole, in the order of the graph."""
        from graphprune.coupling.branches import find_branches

        return find_branches(self)

    @cached_property
    def all_sites(self) -> tuple[Site, ...]:
        """Every site, in the order of the graph."""
        from graphprune.coupling.grouping import find_sites

        return find_sites(self)

    @cached_property
    def site(self) -> Mapping[str, Site]:
        """Sites by name."""
        return {site.name: site for site in self.all_sites}

    @property
    def flops(self) -> int:
        """Multiply-adds x 2 of all layers at batch 1."""
        return sum(layer.operator.flops for layer in self.layers)

    @property
    def parameter_count(self) -> int:
        """Number of elements of the layers' weights."""
        return sum(layer.operator.parameters for layer in self.layers)

    def groups(self) -> GroupTable:
        """A table of the groups: size, unit, members, what is frozen and why. Prints as text, iterates over `Group`."""
        from graphprune.reporting.tables import GroupTable

        return GroupTable(self)

    def sites(self, profile: Profile | None = None) -> SiteTable:
        """A table of the sites with the legal patterns, and with measured gains where a profile is given."""
        from graphprune.reporting.tables import SiteTable

        return SiteTable(self, profile)

    def to_networkx(self) -> networkx.DiGraph:
        """The graph of operators; node attributes op, module, shape, flops; edges are tensors."""
        from graphprune.searching.views import to_networkx

        return to_networkx(self)

    def to_pyg(self) -> Data:
        """As PyTorch Geometric data: `x` [nodes, features], `edge_index`, `edge_type` (0 flow, 1 coupling)."""
        from graphprune.searching.views import to_pyg

        return to_pyg(self)
