"""Random search: every decision is drawn uniformly from what the action wall leaves open."""

import numpy as np

from graphprune.searching.problem import Choices, Problem


def random_walk(problem: Problem, rng: np.random.Generator) -> Choices:
    """A plan drawn under the mask, site by site, every legal option as likely as the others."""
    choices: Choices = ()
    for _ in problem.decisions:
        choices = (*choices, int(rng.choice(np.flatnonzero(problem.mask(choices)))))
    return choices


class RandomSearch:
    """The baseline that any search must beat."""

    name = "random"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate random plans until the trials are spent; a plan that comes up again counts again."""
        while problem.remaining > 0:
            problem.evaluate(random_walk(problem, rng))
