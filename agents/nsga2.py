"""NSGA-II: a population of plans that nothing beats in both accuracy and cost is crossed and mutated.

Deb, Pratap, Agarwal and Meyarivan (IEEE Transactions on Evolutionary Computation 6(2), 2002), as Optuna has it: uniform
crossover, one site of a plan mutated on average. Ours is the action wall around it (`proposals`), from whose legal
options mutations are drawn, and the size of the population.
"""

import numpy as np
from optuna.samplers import NSGAIISampler

from graphprune.agents.proposals import Objective, search
from graphprune.searching.environment import reward
from graphprune.searching.problem import Problem

GENERATIONS = 20
"""How many generations the trials last for. They are few: a population of the usual size would hardly evolve."""
POPULATION = (4, 50)
"""The smallest and the largest population (Optuna's default)."""
OBJECTIVES: tuple[Objective, ...] = (
    ("maximize", reward),
    ("minimize", lambda problem, record, choices: problem.overrun(choices)),
)
"""Accuracy (-1 for a failure, less for what a measurement overruns) and the predicted overrun. The wall sees to it that
every plan is feasible by prediction, so no constraint is told.
"""


class NSGA2:
    """Optuna's NSGA-II over one categorical parameter per site, for accuracy and cost."""

    name = "nsga2"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate new plans until the trials are spent or none turns up."""
        population = int(np.clip(problem.trials // GENERATIONS, *POPULATION))
        search(problem, rng, lambda seed: NSGAIISampler(population_size=population, seed=seed), OBJECTIVES)
