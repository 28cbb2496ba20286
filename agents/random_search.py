"""Random search: every decision is drawn uniformly from what the action wall leaves open."""

import numpy as np

from graphprune.problem import Problem


class RandomSearch:
    """The baseline that any search must beat."""

    name = "random"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate random plans until the trials are spent; a plan that comes up again counts again."""
        while problem.remaining > 0:
            choices: tuple[int, ...] = ()
            for _ in problem.decisions:
                choices = (*choices, int(rng.choice(np.flatnonzero(problem.mask(choices)))))
            problem.evaluate(choices)
