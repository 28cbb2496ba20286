"""Global greedy ranking: always take the step that costs the least error for what it saves."""

import numpy as np

from graphprune.searching.problem import Choices, Problem


def steps(problem: Problem, choices: Choices) -> list[tuple[float, Choices]]:
    """Every change of one site that lowers the overrun, as (error added per overrun saved, the new choice vector)."""
    current = np.array([choices], dtype=np.int64)
    error, overrun = problem.error(choices), problem.overrun(choices)
    found = []
    for site, decision in enumerate(problem.decisions):
        saved = overrun - problem.sweep_overruns(current, site)[0]
        added = problem.error.sweep(current, site, len(decision.options))[0] - error
        for option in np.flatnonzero(saved > 1e-12).tolist():
            found.append((float(added[option] / saved[option]), (*choices[:site], option, *choices[site + 1 :])))
    return found


class Magnitude:
    """One plan, no search: from dense, step by step, until the target holds."""

    name = "magnitude"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate the greedy plan, or the cheapest one where the steps end before the target is met."""
        choices = problem.dense
        while not problem.feasible(choices) and (options := steps(problem, choices)):
            choices = problem.canonical(min(options)[1])
        problem.evaluate(choices if problem.allows(choices) else problem.cheapest)
