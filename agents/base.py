"""What every agent offers: it proposes plans for a problem and learns from their records."""

from typing import Protocol

import numpy as np

from graphprune.searching.problem import Problem


class Agent(Protocol):
    """Searches for the most accurate feasible plan.

    `run` calls `problem.evaluate(choices)` until it has nothing more to try or BudgetSpent is raised (it may let that
    pass through). All randomness comes from `rng`: the same problem and seed give the same evaluations. It only ever
    proposes options that `problem.mask` allows, and a failed record (`record.error`) must not stop it.
    """

    name: str

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search. The result is in `problem.records`."""
        ...
