"""The units of every site (channels, heads, kernel positions, branches), and what keeping some of them asks for.

The units of a site are decided one by one, but what is offered there are whole options. So each option states which
share of each unit it would like to see kept, its template, and the option whose template is nearest to the decisions
(least squares, larger units counting more) is what they ask for:

- A kernel whose options have different geometries has the nine positions of a 3x3 kernel as its units. A template is
  the option's geometry: keeping the middle column and little else asks for 3x1.
- Elsewhere the units are channels, heads, hidden units or a kernel's input channels, in at most `BLOCKS` blocks of
  similar importance. Which ones stay is settled in the option, so only how many are kept can matter: a template is the
  option's kept share throughout, for which the nearest in squares is the nearest kept share.
- A branch is one unit, and so is every other site whose units nobody told.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphprune.searching.problem import Decision, Floats, GraphView, Problem
from graphprune.searching.views import COUPLING

BLOCKS = 8
"""Most units of a site. More would cost time and explore less: the mean of many coins is always near a half."""
UNIT_FEATURES = 6
TIE = 1e-9
"""Of options with templates equally near the one with the least error is taken."""
Bits = NDArray[np.float32]
"""Decisions: 1 keeps a unit, 0 cuts it."""
Vectors = NDArray[np.int64]


def by_position(decision: Decision) -> bool:
    """Whether the units are kernel positions: the geometries tell the options apart."""
    return len({option.geometry for option in decision.options}) > 1


def blocks(decision: Decision) -> list[Floats]:
    """The importances of a site's units, largest first, split into at most `BLOCKS` blocks of nearly equal size."""
    if len(decision.options) == 1:
        return []
    importance = np.sort(np.array(decision.importance or (1.0,), dtype=np.float64))[::-1]
    split: list[Floats] = np.array_split(importance, min(BLOCKS, len(importance)))
    return split


def sizes(decision: Decision) -> Floats:
    """The share of the site that each of its units is: [units]; no units where there is nothing to choose."""
    if by_position(decision):
        return np.full(9, 1 / 9)
    counts = np.array([len(block) for block in blocks(decision)], dtype=np.float64)
    shares: Floats = counts / max(counts.sum(), 1.0)
    return shares


def templates(decision: Decision) -> Floats:
    """The share of each unit that each option would like to see kept: [options, units]."""
    if by_position(decision):
        return np.array([option.geometry for option in decision.options], dtype=np.float64)
    shares = np.array([option.kept_share for option in decision.options])
    return np.repeat(shares[:, None], len(blocks(decision)), axis=1)


def losses(decision: Decision) -> Floats:
    """The share of each unit that goes under each option, the least important first: [options, units]."""
    if by_position(decision):
        return 1 - templates(decision)
    own, shares = sizes(decision), np.array([option.kept_share for option in decision.options])
    before = np.cumsum(own) - own
    return 1 - np.clip((shares[:, None] - before) / np.maximum(own, 1e-12), 0, 1)


class Units:
    """The units of all sites in a row, and how decisions about them become choice vectors.

    `site` holds the site of each unit: [units].
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._sizes = [sizes(decision) for decision in problem.decisions]
        self._templates = [templates(decision) for decision in problem.decisions]
        counts = np.array([len(own) for own in self._sizes], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self.site: Vectors = np.repeat(np.arange(len(counts)), counts)
        self._errors = [np.array([option.error for option in decision.options]) for decision in problem.decisions]

    def __len__(self) -> int:
        return len(self.site)

    def distances(self, kept: Bits, site: int) -> Floats:
        """How far decisions [N, units] are from each option of a site: [N, options]."""
        own, template = self._sizes[site], self._templates[site]
        decided = kept[:, self._ends[site] - len(own) : self._ends[site]]
        squares: Floats = np.square(decided[:, None, :] - template[None, :, :]) @ own
        rank = self._errors[site].argsort(kind="stable").argsort()
        return squares + TIE * rank

    def asked(self, kept: Bits) -> Vectors:
        """What decisions [N, units] ask for at each site, whether or not it meets the target: [N, sites]."""
        nearest = [self.distances(kept, site).argmin(axis=1) for site in range(len(self._sizes))]
        return self.problem.canonicals(np.stack(nearest, axis=1))

    def executed(self, kept: Bits) -> Vectors:
        """The legal plans [N, sites] nearest to what is asked, decided site by site under the action wall."""
        prefixes = np.zeros((len(kept), 0), dtype=np.int64)
        for site in range(len(self._sizes)):
            legal = np.where(self.problem.masks(prefixes), self.distances(kept, site), np.inf)
            prefixes = np.concatenate([prefixes, legal.argmin(axis=1)[:, None]], axis=1)
        return prefixes

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """What is known of each unit, whatever the model: [units, UNIT_FEATURES]."""
        rows = [self._site_features(site) for site in range(len(self._sizes))]
        return np.concatenate([np.zeros((0, UNIT_FEATURES)), *rows]).astype(np.float32)

    def _site_features(self, site: int) -> Floats:
        """[units, 6]: log importance; how often options cut it; error and saving of those (logs) and their rate; kind.

        Importance is in units of the site's mean; error and saving in units of an average site's.
        """
        decision, problem = self.problem.decisions[site], self.problem
        lost = losses(decision)
        weights = lost / np.maximum(lost.sum(axis=0), 1e-12)
        overruns, errors = problem.alone(site)
        overruns = np.where(np.isfinite(overruns), overruns, overruns[0])
        scale = len(self._sizes) / max(abs(problem.error(problem.cheapest) - problem.error(problem.dense)), 1e-9)
        error = np.log(np.maximum((errors - errors[0]) @ weights * scale, 0) + 1e-3)
        saved = np.log(np.maximum((1 - overruns / overruns[0]) @ weights * len(self._sizes), 0) + 1e-3)
        place = np.full(lost.shape[1], float(by_position(decision)))
        return np.stack([self._importance(decision), lost.mean(axis=0), error, saved, error - saved, place], axis=1)

    def _importance(self, decision: Decision) -> Floats:
        """The logarithm of each unit's importance over the site's mean; nothing is known of kernel positions."""
        if by_position(decision):
            return np.zeros(9)
        own = blocks(decision)
        mean = np.mean(np.concatenate([np.zeros(0), *own])) if own else 1.0
        return np.array([np.log(max(float(block.mean()), 1e-6) / max(float(mean), 1e-6)) for block in own])


def merged(graph: GraphView, units: Units) -> GraphView:
    """The model graph and, behind its nodes, one node for each unit, coupled with the node of its site.

    The columns of layers and of units stand side by side, zero for the other kind; the last says which kind it is.
    """
    nodes, own = graph.features.shape
    features = np.zeros((nodes + len(units), own + UNIT_FEATURES + 1), dtype=np.float32)
    features[:nodes, :own] = graph.features
    features[nodes:, own:-1] = units.features
    features[nodes:, -1] = 1.0
    hosts = np.array([decision.node for decision in units.problem.decisions], dtype=np.int64)[units.site]
    members = np.stack([nodes + np.arange(len(units)), hosts])
    types = np.concatenate([graph.edge_types, np.full(len(units), COUPLING)])
    return GraphView(features, np.concatenate([graph.edges, members], axis=1), types)
