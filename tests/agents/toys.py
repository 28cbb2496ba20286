"""Small problems whose best plan can be found by enumeration."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np

from graphprune.record import Record
from graphprune.searching.problem import Choices, Decision, Factor, GraphView, Option, Problem, Sum

Judge = Callable[[Choices], float]


def view(rng: np.random.Generator, nodes: int) -> GraphView:
    """A chain with random features and one coupling edge."""
    edges = np.array([[*range(nodes - 1), 0], [*range(1, nodes), nodes - 1]], dtype=np.int64)
    return GraphView(rng.normal(size=(nodes, 7)).astype(np.float32), edges, np.array([0] * (nodes - 1) + [1]))


def decision(site: int, errors: np.ndarray) -> Decision:
    """A kernel site (even) or a channel site (odd) with evenly spaced kept shares."""
    kind = "channels" if site % 2 else "kernel"
    shares = np.linspace(1, 0.2, len(errors))
    options = tuple(
        Option("dense" if not k else kind, str(k), (0,), float(s), float(e), float(1 / s), () if site % 2 else (1,) * 9)
        for k, (s, e) in enumerate(zip(shares, errors, strict=True))
    )
    importance = tuple((1 + site + np.arange(8) ** 1.5).tolist())
    return Decision(f"site{site}", kind, site, options, importance=importance)


def problem(
    seed: int = 0, sizes: tuple[int, ...] = (4,) * 6, limit: float = 0.4, trials: int = 80, pairs: bool = True
) -> Problem:
    """Random tables: one error factor per site, one cost factor per site and, with `pairs`, per second neighbourhood.

    The evaluator is `hidden_accuracy`: sensitivities and interactions that the error table does not know.
    """
    rng = np.random.default_rng(seed)
    errors = [np.r_[0.0, np.sort(rng.uniform(0.05, 1, size - 1))] for size in sizes]
    weights = rng.dirichlet(np.full(len(sizes), 5.0))
    costs = [Factor((i,), weights[i] * np.linspace(1, 0.2, size)) for i, size in enumerate(sizes)]
    if pairs:
        for i in range(0, len(sizes) - 1, 2):
            both = costs[i].table[:, None] * costs[i + 1].table[None, :]
            costs[i : i + 2] = [Factor((i, i + 1), both / both[0, 0] * (weights[i] + weights[i + 1])), costs[i + 1]]
            costs[i + 1] = Factor((i + 1,), np.zeros(sizes[i + 1]))
    made = Problem(
        decisions=tuple(decision(i, table) for i, table in enumerate(errors)),
        graph=view(rng, len(sizes) + 2),
        costs={"latency": Sum(0.0, tuple(costs))},
        limits={"latency": limit},
        error=Sum(0.0, tuple(Factor((i,), table) for i, table in enumerate(errors))),
        evaluator=lambda choices: Record(
            made.plan(choices), accuracy=accuracy(choices), feasible=made.feasible(choices)
        ),
        trials=trials,
    )
    accuracy = hidden_accuracy(rng, errors)
    return made


def with_branch(seed: int = 0, limit: float = 0.4, trials: int = 20) -> Problem:
    """Three sites: whether a branch stays, the four options inside it, and three outside.

    Nothing that is decided inside a branch that is gone costs or errs, nor does it matter to the accuracy.
    """
    made = problem(seed, sizes=(2, 4, 3), limit=limit, trials=trials, pairs=False)
    outside = made.decisions[2]
    inside = replace(made.decisions[1], gone_with=(0,))
    made.decisions = (replace(made.decisions[0], kind="block"), inside, outside)
    errors, costs = ([factor.table for factor in total.factors] for total in (made.error, made.costs["latency"]))
    made.error = Sum(0.0, (Factor((0, 1), np.stack([errors[1], 0 * errors[1] + 1.2])), Factor((2,), errors[2])))
    made.costs = {"latency": Sum(0.0, (Factor((0, 1), np.stack([costs[1], 0 * costs[1]])), Factor((2,), costs[2])))}
    return made


def hidden_accuracy(rng: np.random.Generator, errors: list[np.ndarray]) -> Judge:
    """Accuracy in [0, 1] from errors with other sensitivities, and from interactions of neighbours."""
    real = [table * np.r_[1.0, rng.lognormal(0, 0.4, len(table) - 1)] for table in errors]
    ties = [rng.normal(0, 0.15, (len(a), len(b))) for a, b in pairwise(errors)]
    for tie in ties:
        tie[0], tie[:, 0] = 0.0, 0.0

    def accuracy(choices: Choices) -> float:
        total = sum(real[i][k] for i, k in enumerate(choices))
        total += sum(tie[choices[i], choices[i + 1]] for i, tie in enumerate(ties))
        return float(1 / (1 + np.exp(total - 1)))

    return accuracy


def feasible_plans(made: Problem) -> list[Choices]:
    """Every choice vector that meets the target, by enumeration."""
    every = product(*(range(len(decision.options)) for decision in made.decisions))
    return [choices for choices in every if made.feasible(choices)]


def accuracy_of(made: Problem, choices: Choices) -> float:
    """The evaluator's accuracy, without spending a trial."""
    record = made.evaluator(choices)
    assert record.accuracy is not None
    return record.accuracy


def watched(made: Problem) -> list[Choices]:
    """From now on the evaluator notes here what it is asked for, in order."""
    asked: list[Choices] = []
    inner = made.evaluator

    def evaluator(choices: Choices) -> Record:
        asked.append(choices)
        return inner(choices)

    made.evaluator = evaluator
    return asked
