"""A plan that is cut a little more than another, which just missed the target, or less where that one leaves room."""

import numpy as np

from graphprune.searching.problem import ROUNDING, Choices, Problem


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


def loosened(problem: Problem, choices: Choices, overrun: float) -> Choices | None:
    """A plan of less error whose predicted overrun is at most `overrun`; None where no single change leads to one.

    Greedy, the other way round: one site after another takes the option that takes away the most error for what it
    costs, while there is room for one.
    """
    plan = tuple(choices)
    while True:
        changed = problem.singles(plan)
        costs = problem.overruns(changed)
        spent = np.maximum(costs - problem.overrun(plan), ROUNDING)
        error = problem.error(plan)
        less = error - problem.error.batch(changed)
        enough = less > ROUNDING * error  # what only rounding tells apart would be exchanged for ever
        rates = np.where((costs <= overrun + ROUNDING) & enough, less / spent, 0.0)
        if not rates.any():
            break
        plan = tuple(changed[rates.argmax()].tolist())
    return None if plan == tuple(choices) else problem.canonical(plan)
