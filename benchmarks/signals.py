"""What a search sees of a plan, and how well that tells which plan is better on images that no search has seen.

    python benchmarks/signals.py --data DIR --weights DIR [--models resnet20,vit] [--plans 100]

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets, WEIGHTS a folder with cifar10_<model>.safetensors;
those that `train.py` has written are found by themselves. The plans are such as searches try: the dynamic programme's
for random weights of the layers' errors, at half of the dense latency by prediction, cut and repaired as in a search.
Each is judged on 1,000 validation images and on 4,000 that are in no slice (`unseen.py`). Signals are the predicted
sum of errors, which needs no trial, and on 250, 500 or 1,000 images the share of wrong answers, the mean
Kullback-Leibler divergence from the dense model's class probabilities, and the deviation of the outputs (squared,
relative to the dense ones), which agents learn from. No test set is read, nothing is fine-tuned.

The table gives Spearman's rank correlation of each signal with the accuracy on unseen images, over all plans and over
the better third of them, by that accuracy, which are those that a search has to tell apart; below it stands the mean
unseen accuracy of the plan that is taken out of 40 (random draws of the plans above): the one with most right
answers, the one with the least deviation, and the first of `finalists.ranked`, which weighs both. Writes
`results/signals-<engine>-1t-<processor>.json`, plan by plan; the results of other models in the file are kept.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import prepared, result_file, trained_parser
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from unseen import UNSEEN, unseen

from graphprune.agents.dp import Solver
from graphprune.machine import environment
from graphprune.plan import Choice, Plan
from graphprune.record import Record
from graphprune.searching.finalists import ranked
from graphprune.searching.problem import Choices, Problem
from graphprune.searching.search import Session
from graphprune.tasks.task import predict

LATENCY = 0.5
POWERS, WIDTHS = (0.5, 0.75, 1.0, 1.5), (0.3, 0.6, 1.0)
"""Powers of the layers' errors, and standard deviations of the logarithms of their weights."""
LOOKS = (250, 500, 1000)
"""Numbers of images."""
SIGNALS = ("wrong", "divergence", "deviation")
ATTEMPTS = 20
"""How many plans are drawn at most for each that is wanted, since they may be alike."""
DRAWN, DRAWS = 40, 2000
BETTER = 1 / 3
Line = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    made = trained_parser(__doc__, "resnet20,resnet56,vit")
    made.add_argument("--plans", type=int, default=100)
    return made.parse_args()


def drawn(problem: Problem, count: int) -> list[Choices]:
    """Different plans that are best for some weights of the errors; fewer than `count` where no others turn up."""
    solver, rng = Solver(problem), np.random.default_rng(0)
    found = dict.fromkeys([solver.solve()])
    for _ in range(ATTEMPTS * count):
        if len(found) >= count:
            break
        weights = np.exp(rng.choice(WIDTHS) * rng.normal(size=solver.layers))
        found[solver.solve(1.0, float(rng.choice(POWERS)), weights)] = None
    return [plan for plan in found if plan is not None]


def signals(outputs: Tensor, dense: Tensor, targets: Tensor) -> dict[str, float]:
    """What can be said of outputs [N, classes] beside the dense model's, with labels [N]."""
    logarithms, expected = outputs.double().log_softmax(1), dense.double().log_softmax(1)
    return {
        "wrong": float((outputs.argmax(1) != targets).double().mean()),
        "divergence": float((expected.exp() * (expected - logarithms)).sum(1).mean()),
        "deviation": float((outputs - dense).double().square().sum() / dense.double().square().sum()),
    }


def judge(session: Session, plan: Choices, seen: Sequence[Tensor], others: Sequence[Tensor], dense: Tensor) -> Line:
    """A plan's signals on the first of the `seen` images, and its accuracy on others: (inputs, targets) each."""
    cuts = session.candidates.cuts(plan)
    pruned = session.bench.build(cuts)
    answers = session.bench.answers(pruned, session.bench.file(pruned, cuts))
    outputs, unknown = (torch.cat([answers(part) for part in images.split(250)]) for images in (seen[0], others[0]))
    return {
        "choices": list(plan),
        "error": session.error(plan),
        "seen": {str(n): signals(outputs[:n], dense[:n], seen[1][:n]) for n in LOOKS},
        "unseen": float((unknown.argmax(1) == others[1]).double().mean()),
    }


def table(model: str, lines: Sequence[Line]) -> str:
    """The correlations, and what is taken of some plans."""
    better = sorted(lines, key=lambda line: line["unseen"])[-max(2, round(len(lines) * BETTER)) :]
    worst, best = better[0]["unseen"], better[-1]["unseen"]
    heads = "".join(f"{f'{n} images':>12}" for n in LOOKS)
    text = [f"{model}: {len(lines)} plans up to {best:.1%} on unseen images; the better {len(better)} from {worst:.1%}"]
    text += [f"{'':18}{'all':36}the better third", f"{'':16}{heads}{heads}"]
    errors = (agreement(some, lambda line: line["error"]) for some in (lines, better))
    text.append(f"{'predicted error':16}" + (" " * 24).join(errors))
    for name in SIGNALS:
        cells = (
            agreement(some, lambda line, n=n, name=name: line["seen"][str(n)][name])  # type: ignore[misc]
            for some, n in product((lines, better), LOOKS)
        )
        text.append(f"{name:16}" + "".join(cells))
    for name, order in ORDERS.items():
        text.append(f"{name:16}" + "".join(f"{taken(lines, n, order):12.2%}" for n in LOOKS))
    return "\n".join(text)


def agreement(lines: Sequence[Line], signal: Callable[[Line], float]) -> str:
    """Spearman's correlation of what a signal promises with the accuracy on unseen images."""
    found = spearmanr([-signal(line) for line in lines], [line["unseen"] for line in lines])
    return f"{found.statistic:12.2f}"


def by_ranking(lines: Sequence[Line], images: int) -> int:
    """The place of the line that `finalists.ranked` puts first."""
    records = [
        Record(
            Plan("", (Choice(str(number), "", "", ()),)), 1 - line["seen"][str(images)]["wrong"], feasible=True,
            deviation=line["seen"][str(images)]["deviation"],
        )
        for number, line in enumerate(lines)
    ]  # fmt: skip
    return int(ranked(records, images)[0].plan.choices[0].site)


def by_least(signal: str) -> Callable[[Sequence[Line], int], int]:
    """What finds the place of the line with the least of a signal."""
    return lambda lines, images: int(np.argmin([line["seen"][str(images)][signal] for line in lines]))


ORDERS = {"most right": by_least("wrong"), "least deviation": by_least("deviation"), "ranked": by_ranking}


def taken(lines: Sequence[Line], images: int, order: Callable[[Sequence[Line], int], int]) -> float:
    """The mean unseen accuracy of what an order takes out of `DRAWN` plans."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        some: NDArray[np.int64] = rng.choice(len(lines), min(DRAWN, len(lines)), replace=False)
        own = [lines[number] for number in some]
        found.append(own[order(own, images)]["unseen"])
    return mean(found)


def main() -> None:
    """All plans of all models; the results of other models in the file are kept."""
    options = arguments()
    options.images = max(LOOKS)
    path = result_file("signals")
    plans: dict[str, list[Line]] = json.loads(path.read_text())["plans"] if path.exists() else {}
    for model in options.models.split(","):
        session = prepared(model, options, LATENCY)
        seen, others = (
            tuple(map(torch.cat, zip(*task.validation, strict=True)))
            for task in (session.task, unseen(session.task, options.data))
        )
        dense = torch.cat([predict(session.module, part) for part in seen[0].split(250)])
        problem = session.problem(1, {"latency": LATENCY})
        plans[model] = [judge(session, plan, seen, others, dense) for plan in drawn(problem, options.plans)]
        path.write_text(json.dumps({"unseen images": UNSEEN, "plans": plans, "environment": environment()}) + "\n")
        print(table(model, plans[model]), flush=True)


if __name__ == "__main__":
    main()
