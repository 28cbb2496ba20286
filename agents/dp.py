"""Dynamic programming over the error and latency tables.

The way of SPDY (Frantar and Alistarh, ICML 2022, arXiv 2201.13096) and ZipLM (Kurtic, Frantar, Alistarh, NeurIPS 2023,
arXiv 2302.04089): errors and costs of layers add up, so the least error within a budget is a knapsack; the weights of
the layers' errors are then searched, because the sum of errors is not the loss. Ours: what sites share (the width of a
stream, a branch that goes with all that is inside it) is solved with them, by `frontier.Programme`.
"""

import numpy as np

from graphprune.agents.frontier import Programme, weighted
from graphprune.searching.problem import Choices, Floats, Problem

SCALES = (1.0, 0.97, 0.94)
EXPONENTS = (1.0, 0.5, 0.75, 1.5, 2.0)
STALLS = 50
"""The search over sensitivities stops after this many plans in a row that are not new."""


class Solver:
    """The tables of a problem under its tightest cost."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cost = max(problem.limits, key=lambda name: problem.costs[name](problem.dense) / problem.limits[name])
        sizes = [len(decision.options) for decision in problem.decisions]
        self.programme = Programme(problem.error, problem.costs[self.cost], sizes)

    @property
    def layers(self) -> int:
        """How many errors can be weighted."""
        return len(self.problem.error.factors)

    def solve(self, scale: float = 1.0, exponent: float = 1.0, weights: Floats | None = None) -> Choices | None:
        """The best plan for a scaled limit and errors raised to a power, then weighted [layers]; None without one."""
        errors = weighted(self.problem.error, exponent, np.ones(self.layers) if weights is None else weights)
        found = self.programme.least(errors, self.problem.limits[self.cost] * scale)
        if found is None:
            return None
        plan = self.problem.canonical(found.tolist())
        return plan if self.problem.allows(plan) else None


class DynamicProgramming:
    """Solves the tables (within discretisation) at several budgets and exponents, then searches sensitivities."""

    name = "dp"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate each new solution until the trials are spent or nothing new turns up."""
        if not problem.decisions:
            problem.evaluate(())
            return
        solver = Solver(problem)
        tried: dict[Choices, float] = {}
        for scale in SCALES:
            for exponent in EXPONENTS:
                self._try(problem, solver.solve(scale, exponent), tried)
        if not tried:
            problem.evaluate(problem.cheapest)
            return
        self._search(problem, solver, tried, rng)

    def _search(self, problem: Problem, solver: Solver, tried: dict[Choices, float], rng: np.random.Generator) -> None:
        """Local search over the logarithms of the layers' sensitivities: SPDY's outer loop."""
        centre = np.zeros(solver.layers)
        best, stalls, width = max(tried.values()), 0, 1.0
        while stalls < STALLS:
            probe = centre + width * rng.normal(size=len(centre)) * (rng.random(len(centre)) < 0.5)
            value = self._try(problem, solver.solve(weights=np.exp(probe)), tried)
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
