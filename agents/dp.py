"""Dynamic programming over the error and latency tables.

The way of SPDY (Frantar and Alistarh, ICML 2022, arXiv 2201.13096) and ZipLM (Kurtic, Frantar, Alistarh, NeurIPS 2023,
arXiv 2302.04089): errors and costs of layers add up, so the least error within a budget is a knapsack; the weights of
the layers' errors are then searched, because the sum of errors is not the loss. Ours: sites that share a factor form a
component, solved as a whole into its (cost, error) front, by enumeration or, where that is too much, by sweeps of
coordinate descent over a Lagrange multiplier.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from graphprune.agents.fronts import front
from graphprune.problem import Choices, Factor, Floats, Problem, Sum

BINS = 2000
"""Steps into which the budget is divided; each component rounds up by at most one."""
ENUMERABLE = 5000
"""Up to this many combinations a component is enumerated."""
MULTIPLIERS = np.geomspace(1e-3, 1e3, 60)
"""Lagrange multipliers, relative to a component's error per cost."""
SCALES = (1.0, 0.97, 0.94)
EXPONENTS = (1.0, 0.5, 0.75, 1.5, 2.0)
STALLS = 100
"""The search over sensitivities stops after this many plans in a row that are not new."""
Vectors = NDArray[np.int64]


@dataclass(frozen=True)
class Component:
    """Sites that factors tie together, and candidate settings [M, sites] with their costs [M] and errors by factor."""

    sites: tuple[int, ...]
    settings: Vectors
    costs: Floats
    errors: tuple[Floats, ...]
    """One [M] array for each of the component's error factors."""


def components(problem: Problem, cost: str) -> list[Component]:
    """Partition the sites by shared factors, and list each part's candidates for the given cost."""
    count = len(problem.decisions)
    factors = [*problem.error.factors, *problem.costs[cost].factors]
    ties = [(factor.sites[0], other) for factor in factors for other in factor.sites]
    rows, columns = np.array(ties, dtype=np.int64).reshape(-1, 2).T
    _, labels = connected_components(
        csr_array((np.ones(len(ties)), (rows, columns)), shape=(count, count)), directed=False
    )
    return [_component(problem, cost, tuple(np.flatnonzero(labels == label).tolist())) for label in np.unique(labels)]


def _component(problem: Problem, cost: str, sites: tuple[int, ...]) -> Component:
    costs, errors = _local(problem.costs[cost], sites), _local(problem.error, sites)
    sizes = tuple(len(problem.decisions[site].options) for site in sites)
    if np.prod(sizes, dtype=np.float64) <= ENUMERABLE:
        settings = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)
    else:
        settings = sweep_multipliers(costs, errors, sizes)
    return Component(sites, settings, costs.batch(settings), tuple(errors.parts(settings).T))


def _local(total: Sum, sites: tuple[int, ...]) -> Sum:
    """The part of a sum that depends on some sites, numbered from zero."""
    own = [factor for factor in total.factors if factor.sites[0] in sites]
    return Sum(0.0, tuple(Factor(tuple(sites.index(site) for site in factor.sites), factor.table) for factor in own))


def sweep_multipliers(costs: Sum, errors: Sum, sizes: tuple[int, ...]) -> Vectors:
    """Minimise error + multiplier x cost by coordinate descent, multipliers rising and falling: [M, sites]."""
    dense = np.zeros((1, len(sizes)), dtype=np.int64)
    spans = [errors.sweep(dense, site, size) for site, size in enumerate(sizes)]
    savings = [costs.sweep(dense, site, size) for site, size in enumerate(sizes)]
    unit = sum(float(np.ptp(span)) for span in spans) / max(sum(float(np.ptp(saving)) for saving in savings), 1e-12)
    found = [dense[0]]
    for multiplier in [*MULTIPLIERS, *MULTIPLIERS[::-1]]:
        found.append(_descend(costs, errors, sizes, multiplier * unit, found[-1]))
    return np.unique(np.array(found), axis=0)


def _descend(costs: Sum, errors: Sum, sizes: tuple[int, ...], multiplier: float, start: Vectors) -> Vectors:
    setting = start[None, :].copy()
    for _ in range(10):
        before = setting.copy()
        for site, size in enumerate(sizes):
            value = errors.sweep(setting, site, size)[0] + multiplier * costs.sweep(setting, site, size)[0]
            setting[0, site] = value.argmin()
        if (setting == before).all():
            break
    return np.asarray(setting[0])


def knapsack(costs: list[Floats], errors: list[Floats], budget: float) -> list[int] | None:
    """One index per component with the least total error and total cost within the budget; None if nothing fits."""
    floors = [float(cost.min()) for cost in costs]
    room = budget - sum(floors)
    if room < 0:
        return None
    step = max(room / BINS, 1e-12)
    best, picks = np.zeros(BINS + 1), []
    for cost, error, floor in zip(costs, errors, floors, strict=True):
        needs = np.ceil((cost - floor) / step - 1e-9)
        table = np.full((len(cost), BINS + 1), np.inf)
        for index, need in enumerate(needs):
            if need <= BINS:
                table[index, int(need) :] = best[: BINS + 1 - int(need)] + error[index]
        picks.append((table.argmin(axis=0), needs))
        best = table.min(axis=0)
    left, chosen = BINS, []
    for pick, needs in reversed(picks):
        chosen.append(int(pick[left]))
        left -= int(needs[chosen[-1]])
    return chosen[::-1]


class Solver:
    """The components of a problem under its tightest cost, and the knapsack over them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cost = max(problem.limits, key=lambda name: problem.costs[name](problem.dense) / problem.limits[name])
        self.components = components(problem, self.cost)

    def solve(self, scale: float, exponent: float, weights: Floats) -> Choices | None:
        """The best plan for a scaled limit and errors raised to a power and weighted; None if none is legal."""
        problem, constant = self.problem, self.problem.costs[self.cost].constant
        errors = [
            weight * np.sum([np.sign(part) * np.abs(part) ** exponent for part in component.errors], axis=0)
            + np.zeros(len(component.costs))
            for weight, component in zip(weights, self.components, strict=True)
        ]
        fronts = [front(component.costs, error) for component, error in zip(self.components, errors, strict=True)]
        picks = knapsack(
            [component.costs[kept] for component, kept in zip(self.components, fronts, strict=True)],
            [error[kept] for error, kept in zip(errors, fronts, strict=True)],
            problem.limits[self.cost] * scale - constant,
        )
        if picks is None:
            return None
        choices = np.zeros(len(problem.decisions), dtype=np.int64)
        for component, kept, pick in zip(self.components, fronts, picks, strict=True):
            choices[list(component.sites)] = component.settings[kept[pick]]
        plan = problem.canonical(choices.tolist())
        return plan if problem.allows(plan) else None


class DynamicProgramming:
    """Solves the tables (within discretisation) at several budgets and exponents, then searches sensitivities."""

    name = "dp"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate each new solution until the trials are spent or nothing new turns up."""
        if not problem.decisions:
            problem.evaluate(())
            return
        solver = Solver(problem)
        equal = np.ones(len(solver.components))
        tried: dict[Choices, float] = {}
        for scale in SCALES:
            for exponent in EXPONENTS:
                self._try(problem, solver.solve(scale, exponent, equal), tried)
        if not tried:
            problem.evaluate(problem.cheapest)
            return
        self._search(problem, solver, tried, rng)

    def _search(self, problem: Problem, solver: Solver, tried: dict[Choices, float], rng: np.random.Generator) -> None:
        """Local search over the logarithms of the components' sensitivities: SPDY's outer loop."""
        centre = np.zeros(len(solver.components))
        best, stalls, width = max(tried.values()), 0, 1.0
        while stalls < STALLS:
            probe = centre + width * rng.normal(size=len(centre)) * (rng.random(len(centre)) < 0.5)
            value = self._try(problem, solver.solve(1.0, 1.0, np.exp(probe)), tried)
            if value is None:  # nothing new so near: look farther away
                stalls, width = stalls + 1, min(1.05 * width, 3.0)
                continue
            stalls, width = 0, max(0.95 * width, 0.1)
            if value > best:
                best, centre = value, probe

    def _try(self, problem: Problem, plan: Choices | None, tried: dict[Choices, float]) -> float | None:
        """Evaluate a plan that is new; returns its accuracy (-1 for a failure), None if it is not new."""
        if plan is None or plan in tried:
            return None
        tried[plan] = problem.evaluate(plan).rank[1]
        return tried[plan]
