"""The plan without data and without a search: the same share of every group, largest weights first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from graphprune.coupling.axes import Form, Indices
from graphprune.coupling.graph import ModelGraph, Site
from graphprune.engines.base import Model, Timing
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.plan import Choice, Plan
from graphprune.repairing.compensation import rank_by_magnitude
from graphprune.timing.profile import Profile

PATTERN = {"channels": "filter", "heads": "heads", "hidden": "hidden"}
"""Kinds of groups that are cut, and the pattern that cuts each."""

ALIGN = 16
"""Rows of a vector block where no profile says otherwise."""


def uniform_plan(graph: ModelGraph, keep: float = 0.5, align: int | None = None) -> Plan:
    """Keep the share `keep` of every channel group, every layer's heads and every MLP's hidden units.

    The number kept is rounded up, channels and hidden units to whole blocks of `align` rows: for None the vector block
    of this machine's cached profile, or 16 where nothing is cached (nothing is measured here). The units with the
    largest weights stay. Raises InputError unless 0 < keep <= 1 and align >= 1.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is the share of each group that stays, in (0, 1], not {keep}")
    if align is not None and align < 1:
        raise InputError(f"align is a number of rows, at least 1, not {align}")
    block = cached_block() if align is None else align
    sites = [site for site in graph.all_sites if site.kind in PATTERN]
    choices = [_choice(graph, site, count) for site in sites if (count := kept_units(site, keep, block)) < site.size]
    return Plan(graph.signature, tuple(choices), graph.inputs)


def kept_units(site: Site, keep: float, block: int) -> int:
    """How many units stay: the share rounded up, and for channels and hidden units up to whole blocks of rows."""
    exact = math.ceil(keep * site.size - 1e-9)  # 0.07 * 100 is a little more than 7
    step = 1 if site.kind == "heads" else block // math.gcd(block, site.unit)
    return min(site.size, math.ceil(exact / step) * step)


def _choice(graph: ModelGraph, site: Site, count: int) -> Choice:
    best = np.argsort(-magnitudes(graph, site.atom), kind="stable")[:count]
    keep = tuple(sorted(int(unit) for unit in best))
    return Choice(site.name, PATTERN[site.kind], f"{count} of {site.size}", keep)


def magnitudes(graph: ModelGraph, atom: int) -> NDArray[np.float64]:
    """How large the weights of each unit of a group are [units], over all parameters that the group runs through."""
    trained = set(graph.exported.graph_signature.parameters)
    weights = [
        (
            graph.exported.state_dict[parameter.name],
            axis,
            torch.from_numpy(unit_rows(parameter.axes[axis], atom, graph.atom_sizes[atom])),
        )
        for parameter, axis in graph.spans.get(atom, ())
        if parameter.name in trained
    ]
    return rank_by_magnitude(weights, graph.atom_sizes[atom])


def unit_rows(form: Form, atom: int, units: int) -> Indices:
    """The indices of an axis that belong to each unit: [units, rows]. Those of other groups on it belong to none."""
    if form.kind == "atom":
        return np.arange(units)[:, None]
    others = form.kept({atom: np.zeros(0, dtype=np.int64)})
    kept = (form.kept({atom: np.array([unit])}) for unit in range(units))
    return np.stack([np.setdiff1d(rows, others, assume_unique=True) for rows in kept])


def cached_block() -> int:
    """The vector block that an earlier profile of ONNX Runtime (one thread) on this machine found, or `ALIGN`."""
    try:
        return Profile(_Unmeasured(OnnxRuntimeEngine().identity)).block
    except _NotCachedError:
        return ALIGN


class _NotCachedError(Exception):
    """The cache does not hold what is asked for."""


@dataclass(frozen=True)
class _Unmeasured:
    """Stands for an engine whose times may be read from the cache, but not be measured now."""

    identity: str
    batch: int = 1
    sparse_kernels: bool = False

    def run(self, model: Model, inputs: Mapping[str, NDArray[np.generic]]) -> NoReturn:
        raise _NotCachedError

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        raise _NotCachedError
