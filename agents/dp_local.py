"""Dynamic programming, then coordinate search from the best of its plans: the baseline that learned agents must beat.

The start is that of SPDY (Frantar and Alistarh, ICML 2022, arXiv 2201.13096) and ZipLM (Kurtic, Frantar, Alistarh,
NeurIPS 2023, arXiv 2302.04089): the knapsack over layer errors and costs, solved in `dp`. Both then search the weights
of the layers' errors, every step of which moves many layers at once. Ours is what follows here instead: the tables are
right about most sites, so the plan itself is corrected where they are wrong, by one site or by an exchange between two
at a time, in the order of the predicted error, and each change is judged by a real evaluation. SPDY's random weights
are what restarts it when nothing near is better. Nothing is learnt from the records but which plan is the best.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from graphprune.agents.dp import EXPONENTS, SCALES, Solver
from graphprune.agents.wall import passes
from graphprune.searching.problem import ROUNDING, Choices, Floats, Problem

PART = 0.5
"""Most of the trials, as a share, that go to the dynamic programme's own solutions (at most one per setting of it)."""
BREADTH = 2000
"""The neighbours of a plan that are tried at most, those with the least predicted error."""
SPREAD = 0.5
"""Standard deviation of the logarithms of the error weights that a restart begins with; it doubles over `ATTEMPTS`."""
ATTEMPTS = 50
"""How many random weights in a row may lead to known plans."""
Vectors = NDArray[np.int64]


def exchanges(problem: Problem, plan: Choices, dearer: Vectors) -> tuple[Vectors, Floats]:
    """`dearer` plans [M, sites] with one more site made cheaper so that the target holds: [N, sites], with errors [N].

    At most the `BREADTH` with the least predicted error.
    """
    base = np.array([plan], dtype=np.int64)
    found, errors = np.zeros((0, len(plan)), dtype=np.int64), np.zeros(0)
    for site, option in enumerate(plan):
        alone = problem.sweep_overruns(base, site)[0]
        meets = problem.sweep_overruns(dearer, site) <= 1 + ROUNDING
        meets &= (alone < alone[option]) & (dearer[:, site] == option)[:, None]
        rows, options = np.nonzero(meets)
        added = problem.error.sweep(dearer, site, len(alone))[rows, options]
        least = np.argsort(added, kind="stable")[:BREADTH]
        changed = dearer[rows[least]]
        changed[:, site] = options[least]
        found, errors = np.concatenate([found, changed]), np.concatenate([errors, added[least]])
        kept = np.argsort(errors, kind="stable")[:BREADTH]
        found, errors = found[kept], errors[kept]
    return found, errors


def neighbours(problem: Problem, plan: Choices) -> Iterator[Choices]:
    """Plans with one site changed, or one made dearer and another cheaper, that meet the target: least error first."""
    changed = problem.singles(plan)
    overruns = problem.overruns(changed)
    cheap = changed[overruns <= 1 + ROUNDING]
    pairs, errors = exchanges(problem, plan, changed[overruns > problem.overrun(plan)])
    order = np.argsort(np.concatenate([problem.error.batch(cheap), errors]), kind="stable")[:BREADTH]
    for vector in np.concatenate([cheap, pairs])[order]:
        yield problem.canonical(vector.tolist())


class DynamicProgrammingLocal:
    """Reads the best plan off the tables, then corrects it change by change; without a better neighbour it restarts."""

    name = "dp+local"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate new plans until the trials are spent or none turns up."""
        if not problem.decisions:
            problem.evaluate(())
            return
        search = Search(problem, rng)
        search.start()
        plan: Choices | None = search.best
        while plan is not None:
            search.descend(plan)
            plan = search.restart()


class Search:
    """One run: the solver, and the rank of every plan tried."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem = problem
        self.rng = rng
        self.solver = Solver(problem)
        self.ranks: dict[Choices, tuple[bool, float, float]] = {}

    @property
    def best(self) -> Choices:
        """The best plan so far."""
        return max(self.ranks, key=lambda plan: self.ranks[plan])

    def start(self) -> None:
        """Evaluate the dynamic programme's solutions for its settings; the cheapest plan where it has none."""
        share = max(1, int(PART * self.problem.trials))
        for scale in SCALES:
            for exponent in EXPONENTS:
                if len(self.ranks) < share:
                    self._try(self.solver.solve(scale, exponent))
        if not self.ranks:
            self._evaluate(self.problem.cheapest)

    def descend(self, plan: Choices) -> None:
        """Move to the first neighbour that is better, again and again, until none is."""
        better: Choices | None = plan
        while better is not None:
            rank = self.ranks[plan := better]
            found = neighbours(self.problem, plan)
            better = next((other for other in found if self._try(other) and self.ranks[other] > rank), None)

    def restart(self) -> Choices | None:
        """Evaluate a plan from elsewhere; None when nothing new turns up.

        It is the solution for random weights or, where those are known, what is left beside the best plans.
        """
        for attempt in range(ATTEMPTS):
            width = SPREAD * (1 + attempt / ATTEMPTS)
            weights = np.exp(width * self.rng.normal(size=self.solver.layers))
            if self._try(plan := self.solver.solve(weights=weights)):
                return plan
        for known in sorted(self.ranks, key=lambda plan: self.ranks[plan], reverse=True):
            for plan in neighbours(self.problem, known):
                if self._try(plan):
                    return plan
        return None

    def _try(self, plan: Choices | None) -> bool:
        """Evaluate a plan if it is new and legal; returns whether it was."""
        if plan is None or plan in self.ranks or not passes(self.problem, plan):
            return False
        self._evaluate(plan)
        return True

    def _evaluate(self, plan: Choices) -> None:
        self.ranks[plan] = self.problem.evaluate(plan).rank
