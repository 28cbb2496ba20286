"""A plan that is a little cheaper than another one, for where that one just missed the target."""

import numpy as np

from graphprune.problem import ROUNDING, Choices, Problem


def tightened(problem: Problem, choices: Choices, overrun: float) -> Choices | None:
    """A plan whose predicted overrun is at most `overrun`; None where nothing more can be saved before that.

    Greedy: from `choices`, one site after another takes the option that adds the least error for what it saves (as far
    as that is still needed), like the greedy solution of a knapsack (Dantzig 1957).
    """
    plan = tuple(choices)
    while (now := problem.overrun(plan)) > overrun + ROUNDING:
        changed = problem.singles(plan)
        saved = np.minimum(now - problem.overruns(changed), now - overrun)
        added = problem.error.batch(changed) - problem.error(plan)
        rates = np.divide(added, saved, out=np.full(len(saved), np.inf), where=saved > ROUNDING)
        if not np.isfinite(rates).any():
            return None
        plan = tuple(changed[rates.argmin()].tolist())
    return problem.canonical(plan)
