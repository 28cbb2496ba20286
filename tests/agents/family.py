"""Related toys: half of the sites are robust, half are sensitive, and a feature of the graph tells which."""

import numpy as np

from graphprune.record import Record
from graphprune.searching.problem import Factor, Problem, Sum
from tests.agents.toys import decision, view

CURVE = np.array([0.0, 0.1, 0.3, 0.6])
ROBUST, SENSITIVE = 0.2, 2.0


def member(seed: int, trials: int = 24, limit: float = 0.65) -> Problem:
    """A toy of six sites, a model of its own. To cut the robust sites only meets the target and is nearly the best.

    The error table knows the sensitivities up to a random factor.
    """
    rng = np.random.default_rng(seed)
    sensitivity = rng.permutation(np.repeat([ROBUST, SENSITIVE], 3))
    errors = [CURVE * factor for factor in sensitivity]
    table = [error * rng.lognormal(0, 0.3) for error in errors]
    graph = view(rng, 6)
    graph.features[:, 0] = np.log(sensitivity)

    def judged(choices: tuple[int, ...]) -> Record:
        total = sum(float(error[option]) for error, option in zip(errors, choices, strict=True))
        return Record(made.plan(choices), float(1 / (1 + np.exp(total - 1))), made.feasible(choices))

    made = Problem(
        decisions=tuple(decision(site, error) for site, error in enumerate(table)),
        graph=graph,
        costs={"latency": Sum(0.0, tuple(Factor((site,), np.linspace(1, 0.2, 4) / 6) for site in range(6)))},
        limits={"latency": limit},
        error=Sum(0.0, tuple(Factor((site,), error) for site, error in enumerate(table))),
        evaluator=judged,
        trials=trials,
        model=f"member {seed}",
    )
    return made
