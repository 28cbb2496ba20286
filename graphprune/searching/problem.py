"""The problem that agents solve: sites, options, exact cost tables, and a counted, stored evaluation.

Everything here is numpy: an agent sees patterns only as indices, features and masks, never a torch module or ONNX.
A *choice vector* holds one option index per site; option 0 of every site is "dense".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphprune.plan import Choice, Plan
from graphprune.record import Record

Choices = tuple[int, ...]
Floats = NDArray[np.float64]
ROUNDING = 1e-9
"""A target counts as met up to this relative difference, so that the order of a sum cannot decide it."""


@dataclass(frozen=True)
class Option:
    """One thing that may be done at a site.

    `error` is the error this option alone causes (0 for dense; the sum over affected layers of the exact least-squares
    error, as a share of each layer's output energy, weighted by what an error there does to the network's output).
    `gain` is dense time / time of the site's layers.
    """

    pattern: str
    level: str
    keep: tuple[int, ...]
    kept_share: float
    error: float
    gain: float
    geometry: tuple[float, ...] = ()
    """For kernels: the share of weights kept at each position, resampled to 3x3; otherwise empty."""


@dataclass(frozen=True)
class Decision:
    """A site as agents see it: its options (option 0 is dense) and the node of the graph it belongs to.

    `gone_with` are the numbers of earlier decisions, about branches, after any of which but "dense" nothing is left
    here to decide. `importance` is how large the weights of each unit are: of a group's channels, heads or hidden
    units, of the input channels of a kernel; empty for branches.
    """

    site: str
    kind: str
    node: int
    options: tuple[Option, ...]
    gone_with: tuple[int, ...] = ()
    importance: tuple[float, ...] = ()


@dataclass(frozen=True)
class Factor:
    """A term of a sum over choice vectors: `table[choices[i] for i in sites]`."""

    sites: tuple[int, ...]
    table: Floats

    def __call__(self, choices: Sequence[int]) -> float:
        return float(self.table[tuple(choices[site] for site in self.sites)])

    def sweep(self, choices: NDArray[np.int64], site: int) -> Floats:
        """The term for every option of one of its own sites, the rest as in `choices`: [N or 1, options]."""
        options = np.arange(self.table.shape[self.sites.index(site)])[None, :]
        return np.asarray(self.table[tuple(options if own == site else choices[:, own, None] for own in self.sites)])


@dataclass(frozen=True)
class Sum:
    """A function of a choice vector: a constant plus factors."""

    constant: float
    factors: tuple[Factor, ...]

    def __call__(self, choices: Sequence[int]) -> float:
        return float(self.batch(np.array([choices], dtype=np.int64))[0])

    def batch(self, choices: NDArray[np.int64]) -> Floats:
        """The values of many choice vectors [N, sites] at once: [N]."""
        return np.asarray(self.constant + self.parts(choices).sum(axis=1))

    def weighted(self, weights: Iterable[float]) -> "Sum":
        """The sum with each factor's table times its weight [factors]; the constant stays."""
        pairs = zip(self.factors, weights, strict=True)
        return Sum(self.constant, tuple(Factor(own.sites, own.table * weight) for own, weight in pairs))

    def sweep(self, choices: NDArray[np.int64], site: int, options: int) -> Floats:
        """The values for each of the `options` options of `site`, the rest as in `choices`: [N, options]."""
        own = self._reading.get(site, [])
        rest = self.constant + np.delete(self.parts(choices), own, axis=1).sum(axis=1)
        swept = (self.factors[number].sweep(choices, site) for number in own)
        return np.asarray(sum(swept, np.repeat(rest[:, None], options, axis=1)))

    def parts(self, choices: NDArray[np.int64]) -> Floats:
        """Each factor's term in many choice vectors [N, sites]: [N, factors]."""
        return np.asarray(self.flat[self.places(choices)])

    @cached_property
    def flat(self) -> Floats:
        """All tables in a row."""
        return np.concatenate([np.zeros(0), *(factor.table.reshape(-1) for factor in self.factors)])

    def places(self, choices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in `flat` each factor's term in many choice vectors [N, sites] is: [N, factors]."""
        sites, strides, first = self._layout
        return np.asarray(first + (choices[:, sites] * strides).sum(axis=2))

    def strides(self, count: int) -> NDArray[np.int64]:
        """How far the next option of each of `count` sites moves each factor's place in `flat`: [count, factors]."""
        sites, strides, _ = self._layout
        found = np.zeros((count, len(self.factors)), dtype=np.int64)
        np.add.at(found, (sites, np.arange(len(self.factors))[:, None]), strides)
        return found

    @cached_property
    def _layout(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The sites and strides of each factor [factors, most sites], and where its table begins."""
        shape = len(self.factors), max((len(factor.sites) for factor in self.factors), default=0)
        sites, strides = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for number, factor in enumerate(self.factors):
            sites[number, : len(factor.sites)] = factor.sites
            strides[number, : len(factor.sites)] = np.cumprod((1, *factor.table.shape[:0:-1]))[::-1]
        sizes = np.array([factor.table.size for factor in self.factors], dtype=np.int64)
        return sites, strides, np.cumsum(sizes) - sizes

    @cached_property
    def _reading(self) -> dict[int, list[int]]:
        """The numbers of the factors that depend on each site."""
        found: dict[int, list[int]] = {}
        for number, factor in enumerate(self.factors):
            for site in factor.sites:
                found.setdefault(site, []).append(number)
        return found


@dataclass(frozen=True)
class GraphView:
    """The model graph as arrays: features [nodes, F], edges [2, E] and edge types [E] (0 data flow, 1 coupling)."""

    features: NDArray[np.float32]
    edges: NDArray[np.int64]
    edge_types: NDArray[np.int64]


class BudgetSpent(Exception):
    """Raised by `Problem.evaluate` once all trials are used; an agent lets it pass."""


@dataclass
class Problem:
    """What an agent is given.

    `costs` holds, for each part of the target, the predicted share of the dense model as a `Sum`; a choice vector is
    feasible when each cost is at most its `limits` entry. `error` predicts the total error of a choice vector.
    `evaluator` judges a choice vector for real; it is called at most once for each distinct vector.
    """

    decisions: tuple[Decision, ...]
    graph: GraphView
    costs: Mapping[str, Sum]
    limits: Mapping[str, float]
    error: Sum
    evaluator: Callable[[Choices], Record]
    trials: int
    model: str = ""
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    records: list[Record] = field(default_factory=list)
    _seen: dict[Choices, Record] = field(default_factory=dict)

    @property
    def dense(self) -> Choices:
        """The choice vector that cuts nothing."""
        return (0,) * len(self.decisions)

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """Inside which branch [sites] is which site [sites], decided with the branch where that is gone."""
        found = np.zeros((len(self.decisions),) * 2, dtype=np.bool_)
        for site, decision in enumerate(self.decisions):
            found[list(decision.gone_with), site] = True
        return found

    @property
    def remaining(self) -> int:
        """How many evaluations are left."""
        return self.trials - len(self.records)

    def overrun(self, choices: Sequence[int]) -> float:
        """The largest predicted cost divided by its limit: at most 1 where the target is met."""
        return max(self.costs[name](choices) / limit for name, limit in self.limits.items())

    def feasible(self, choices: Sequence[int]) -> bool:
        """Whether the target is met, by prediction."""
        return self.overrun(choices) <= 1.0 + ROUNDING

    def all_feasible(self, choices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`feasible` of many choice vectors [N, sites] at once: [N]."""
        return np.asarray(self.overruns(choices) <= 1.0 + ROUNDING)

    def overruns(self, choices: NDArray[np.int64]) -> Floats:
        """`overrun` of many choice vectors [N, sites] at once: [N]."""
        shares = [self.costs[name].batch(choices) / limit for name, limit in self.limits.items()]
        return np.asarray(np.max(shares, axis=0))

    def sweep_overruns(self, choices: NDArray[np.int64], site: int) -> Floats:
        """`overrun` for every option of `site`, the rest as in `choices` [N, sites]: [N, options]."""
        options = len(self.decisions[site].options)
        sweeps = [self.costs[name].sweep(choices, site, options) / limit for name, limit in self.limits.items()]
        return np.asarray(np.max(sweeps, axis=0))

    def alone(self, site: int) -> tuple[Floats, Floats]:
        """The overrun and the error of every option of a site, all other sites dense: [options] each."""
        dense = np.array([self.dense], dtype=np.int64)
        overruns = self.sweep_overruns(dense, site)[0]
        return overruns, self.error.sweep(dense, site, len(overruns))[0]

    def singles(self, choices: Choices) -> NDArray[np.int64]:
        """Every choice vector that differs from `choices` at exactly one site, site by site: [M, sites]."""
        found = [np.zeros((0, len(choices)), dtype=np.int64)]
        for site, decision in enumerate(self.decisions):
            others = np.delete(np.arange(len(decision.options)), choices[site])
            changed = np.tile(np.array(choices, dtype=np.int64), (len(others), 1))
            changed[:, site] = others
            found.append(changed)
        return np.concatenate(found)

    @cached_property
    def completions(self) -> tuple[Choices, ...]:
        """Choice vectors that cost little, the cheapest first: the least that the rest of a plan may cost.

        Each is greedy: at one site after another the option that costs least, those still to come dense. Where options
        exclude each other (at an infinite cost), what is cheapest depends on the order: forwards, backwards and by
        what a site alone can save. Branches come last, so that it is known of what is inside them too what would cost
        least if they stayed.
        """
        branches = sorted({number for decision in self.decisions for number in decision.gone_with})
        sites = [site for site in range(len(self.decisions)) if site not in branches]
        dense = np.array([self.dense], dtype=np.int64)
        orders = [sites]
        if any(np.isinf(factor.table).any() for name in self.limits for factor in self.costs[name].factors):
            orders += [sites[::-1], sorted(sites, key=lambda site: float(self.sweep_overruns(dense, site).min()))]
        found = {self._greedy([*order, *branches]): None for order in orders}
        return tuple(sorted(found, key=self.overrun))

    def _greedy(self, order: Sequence[int]) -> Choices:
        choices = np.array([self.dense], dtype=np.int64)
        for site in order:
            choices[0, site] = self.sweep_overruns(choices, site)[0].argmin()
        return tuple(choices[0].tolist())

    @property
    def cheapest(self) -> Choices:
        """The plan of the completion with the smallest overrun."""
        return self.canonical(self.completions[0])

    def mask(self, prefix: Sequence[int]) -> NDArray[np.bool_]:
        """Which options of site `len(prefix)` leave the target reachable: the action wall.

        An option passes if the target holds once all later sites are as in one of the `completions`. Where none
        passes, only the cheapest option is left, so that a mask is never empty. In a branch that is gone only "dense"
        is left.
        """
        only: NDArray[np.bool_] = self.masks(np.array([prefix], dtype=np.int64).reshape(1, len(prefix)))[0]
        return only

    def masks(self, prefixes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`mask` of many prefixes of one length [N, decided sites] at once: [N, options]."""
        count, site = prefixes.shape
        decided = np.full((count, len(self.decisions)), -1, dtype=np.int64)
        decided[:, :site] = prefixes
        return self.open_masks(decided, site)

    def open_masks(self, decided: NDArray[np.int64], site: int) -> NDArray[np.bool_]:
        """The wall at an open site of choice vectors [N, sites] in which any sites are open (-1): [N, options]."""
        passes: NDArray[np.bool_] = np.zeros((len(decided), len(self.decisions[site].options)), dtype=np.bool_)
        for completion in self.completions:
            choices = np.where(decided >= 0, decided, np.array(completion, dtype=np.int64))
            passes |= self.sweep_overruns(choices, site) <= 1.0 + ROUNDING
        passes[~passes.any(axis=1), self.completions[0][site]] = True
        gone = (decided[:, list(self.decisions[site].gone_with)] > 0).any(axis=1)
        passes[gone] = np.arange(passes.shape[1]) == 0
        return passes

    def canonical(self, choices: Sequence[int]) -> Choices:
        """The choice vector of the same plan in which nothing is decided inside a branch that is gone."""
        return tuple(self.canonicals(np.array([choices], dtype=np.int64))[0].tolist())

    def canonicals(self, choices: NDArray[np.int64]) -> NDArray[np.int64]:
        """`canonical` of many choice vectors [N, sites] at once."""
        return np.where((choices > 0) @ self.inside, 0, choices)

    def allows(self, choices: Sequence[int]) -> bool:
        """Whether a whole choice vector meets the target, by prediction, and decides nothing in branches that go."""
        return self.feasible(choices) and self.canonical(choices) == tuple(choices)

    def plan(self, choices: Sequence[int]) -> Plan:
        """The plan of a choice vector; vectors that differ only inside a branch that is gone have the same one."""
        return Plan(
            self.model,
            tuple(
                Choice(decision.site, option.pattern, option.level, option.keep)
                for decision, index in zip(self.decisions, self.canonical(choices), strict=True)
                if index and (option := decision.options[index])
            ),
            self.inputs,
        )

    def evaluate(self, choices: Sequence[int]) -> Record:
        """Judge a choice vector. Every call counts as a trial, repeats too; raises BudgetSpent when none is left."""
        if self.remaining <= 0:
            raise BudgetSpent
        vector = self.canonical(choices)
        if vector not in self._seen:
            self._seen[vector] = self.evaluator(vector)
        self.records.append(self._seen[vector])
        return self.records[-1]

    def best(self) -> Record | None:
        """The best record so far: feasible and accurate; None before the first evaluation."""
        return max(self.records, key=lambda record: record.rank, default=None)
