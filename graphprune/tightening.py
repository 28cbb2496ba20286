"""A plan that is a little cheaper than another one, for where that one just missed the target."""

import numpy as np

from graphprune.problem import ROUNDING, Choices, Problem


def tightened(problem: Problem, choices: Choices, overrun: float) -> Choices | None:
    """A plan whose predicted overrun is at most `overrun`; None where nothing more can be saved before that.

    Greedy: from `choices`, one site after another takes the option that adds the least error for what it saves (as far
    as that is still needed), like the greedy solution of a knapsack (Dantzig 1957).
    """
    plan = np.array([choices], dtype=np.int64)
    while (now := float(problem.overruns(plan)[0])) > overrun + ROUNDING:
        error, best = float(problem.error.batch(plan)[0]), (np.inf, -1, -1)
        for site in range(plan.shape[1]):
            saved = np.minimum(now - problem.sweep_overruns(plan, site)[0], now - overrun)
            added = problem.error.sweep(plan, site, len(saved))[0] - error
            rates = np.divide(added, saved, out=np.full(len(saved), np.inf), where=saved > ROUNDING)
            best = min(best, (float(rates.min()), site, int(rates.argmin())))
        if not np.isfinite(best[0]):
            return None
        plan[0, best[1]] = best[2]
    return problem.canonical(plan[0].tolist())
