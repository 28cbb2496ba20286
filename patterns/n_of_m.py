"""Masks of linear layers and 1x1 convolutions: of each 4 consecutive inputs of every output, 2 stay (2:4).

Kernels for such weights came with NVIDIA's Ampere (Mishra et al. 2021, arXiv 2104.08378);
`graphprune.cutting.semi_structured` hands masked layers to those of torch. An engine without them multiplies the zeros,
so that nothing is gained there. The layer keeps its shape; nothing is rewritten. Which weights stay is decided by what
removing each alone would cost (Optimal Brain Surgeon), and what is left takes over what it can
(`graphprune.repairing.compensation.solve_rows`).
"""

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import ClassVar

import numpy as np
from torch import Tensor

from graphprune.coupling.graph import ModelGraph, Site
from graphprune.cutting.cuts import Cuts
from graphprune.engines.base import Engine
from graphprune.errors import InputError
from graphprune.pattern import Level, Pattern, Scores
from graphprune.plan import Choice, Plan
from graphprune.repairing.calibration import Statistics, calibrate
from graphprune.repairing.compensation import weight_scores

WIDTH = 4
"""Consecutive inputs of an output: a quadruple."""
WAYS = np.array([[i in pair for i in range(WIDTH)] for pair in combinations(range(WIDTH), 2)])
"""The ways in which 2 of a quadruple stay [6, 4], by their number."""
CHUNK = 12
"""Quadruples, output after output, whose ways are told by one number of a plan: their digits to the base 6."""
_BASE = len(WAYS) ** np.arange(CHUNK)
_CODES: int = len(WAYS) ** CHUNK


class NOfM(Pattern):
    """Keeps 2 of each 4 consecutive inputs of every output, those with the highest scores.

    A plan holds one number for each chunk of `CHUNK` quadruples (the last may be shorter): chunk * 6^12 + the ways of
    its quadruples as digits, the first the lowest. So 48 weights take one number, and all numbers of layers of up to
    200 million weights stay below 2^53, which every reader of JSON keeps exact.
    """

    name: ClassVar[str] = "n-of-m"
    kinds: ClassVar[frozenset[str]] = frozenset({"kernel"})

    def refusal(self, engine: Engine | None) -> str:
        """A mask is for engines that declare kernels for it."""
        declared = engine is not None and engine.sparse_kernels
        return "" if declared else "masks gain nothing but on engines with 2:4 kernels"

    def units(self, site: Site) -> int:
        """A unit is one combination of ways of one chunk."""
        return _chunks(site) * _CODES

    def kept(self, site: Site, keep: tuple[int, ...]) -> tuple[int, int]:
        """Half of the weights."""
        return site.filters * site.channels // 2, site.filters * site.channels

    def scored(self, site: Site) -> tuple[int, ...]:
        """Every weight has a score of its own."""
        return site.filters, site.channels

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """One, for linear layers and 1x1 convolutions with whole quadruples."""
        return (Level("2:4", _chunks(site)),) if site.kernel == (1, 1) and site.channels % WIDTH == 0 else ()

    def choose(self, site: Site, level: Level, scores: Scores) -> tuple[int, ...]:
        """The two highest `scores` [filters, channels] of each quadruple."""
        ways = (scores.reshape(-1, WIDTH) @ WAYS.T).argmax(1)
        digits = np.zeros((_chunks(site), CHUNK), dtype=np.int64)
        digits.reshape(-1)[: len(ways)] = ways
        return tuple((digits @ _BASE + np.arange(len(digits)) * _CODES).tolist())

    def rewrite(self, site: Site, keep: tuple[int, ...]) -> Cuts:
        """Mask the layer. Raises InputError unless there is one number for each chunk, with no digit too many."""
        count = _quadruples(site)
        codes = np.array(keep, dtype=np.int64) - np.arange(len(keep)) * _CODES
        digits = codes[:, None] // _BASE % len(WAYS)
        fitting = len(keep) == _chunks(site) and ((codes >= 0) & (codes < _CODES)).all()
        if site.kernel != (1, 1) or site.channels % WIDTH or not fitting or digits.reshape(-1)[count:].any():
            raise InputError(f"{site.name!r} needs one number for each {CHUNK} of its quadruples of inputs")
        mask = WAYS[digits.reshape(-1)[:count]].reshape(site.filters, site.channels)
        return Cuts(masks={site.node: mask})


def mask_plan(graph: ModelGraph, batches: Sequence[Tensor] = (), sites: Collection[str] | None = None) -> Plan:
    """A plan that masks all linear layers and 1x1 convolutions that can be, or those at the named sites.

    `batches` are calibration inputs [N, ...] that tell which weights matter; without them the largest ones stay. The
    plan is for any engine: as a mask, with zeros. Raises InputError for a site that cannot be masked.
    """
    pattern = NOfM()
    possible = {site.name: site for site in graph.all_sites if site.kind in pattern.kinds and pattern.levels(site, 1)}
    if unknown := set(sites or ()) - possible.keys():
        raise InputError(f"no layer can be masked at {min(unknown)!r}; possible: {', '.join(possible) or 'nowhere'}")
    statistics = calibrate(graph, batches) if batches else Statistics({}, {})
    choices = []
    for site in (site for name, site in possible.items() if sites is None or name in sites):
        (level,) = pattern.levels(site, 1)
        weight = graph.exported.state_dict[graph.layer[site.node].weight]
        keep = pattern.choose(site, level, weight_scores(weight, statistics.get(site.node)))
        choices.append(Choice(site.name, pattern.name, level.name, keep))
    return Plan(graph.signature, tuple(choices), graph.inputs)


def _quadruples(site: Site) -> int:
    return site.filters * site.channels // WIDTH


def _chunks(site: Site) -> int:
    return -(-_quadruples(site) // CHUNK)
