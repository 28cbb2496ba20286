"""The tree-structured Parzen estimator: one model of what good plans have in common, one of the others.

Bergstra, Bardenet, Bengio and Kegl (NeurIPS 2011); the multivariate form of Falkner, Klein and Hutter (BOHB, ICML 2018,
arXiv 1807.01774), as Optuna has it. Ours is the action wall around it (`proposals`).
"""

import numpy as np
from optuna.samplers import TPESampler

from graphprune.agents.proposals import search
from graphprune.searching.environment import reward
from graphprune.searching.problem import Problem


class TPE:
    """Optuna's TPE over one categorical parameter per site, rewarded like every agent that learns from rewards."""

    name = "tpe"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate new plans until the trials are spent or none turns up."""
        search(problem, rng, lambda seed: TPESampler(multivariate=True, seed=seed), [("maximize", reward)])
