"""How many candidates a search judges in a minute, against the plain way, and whether it still finds the same ones.

    python benchmarks/candidates.py --data DIR --weights DIR [--model resnet56] [--plans 100] [--images 1000]

CIFAR-10, random plans that meet half of the latency by prediction, one thread. Each plan is judged both ways, one
after the other: plainly (`apply` with its check, repair, all validation images) and as a search does (cut along the
route that was found once, repair, images until it is plain that the plan will not be among the ten best). Resumable:
what is known of each plan is kept in `--work`. Writes `results/candidates-<engine>-1t-<processor>.json`: seconds and
accuracies of every plan, candidates per minute, the ten best by both, and Kendall's tau over the plans that were judged
to the end.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import prepared, result_file
from scipy.stats import kendalltau

import graphprune as gp
from graphprune.agents.random_search import random_walk
from graphprune.engines.fake import FakeEngine
from graphprune.machine import environment
from graphprune.repairing.repair import repair
from graphprune.searching.problem import Choices
from graphprune.searching.search import Session
from graphprune.tasks.sequential import Bar

LATENCY = 0.5
BEST = 10


class Judges:
    """Both ways of judging a plan of one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.problem = session.problem(1, session.limits)
        self.bar = Bar()

    def plainly(self, choices: Choices) -> float:
        """Apply the plan, repair, and look at every image."""
        session = self.session
        plan, cuts = self.problem.plan(choices), session.candidates.cuts(choices)
        pruned = gp.apply(session.module, plan, session.graph)
        repair(pruned, session.module, session.graph, cuts, session.bench.reference)
        return session.task.accuracy(pruned.eval())

    def as_a_search_does(self, choices: Choices) -> tuple[float, int]:
        """Accuracy and images looked at."""
        session, cuts = self.session, self.session.candidates.cuts(choices)
        pruned = session.bench.build(cuts)
        answers = session.bench.answers(pruned, session.bench.file(pruned, cuts))
        judgement = session.task.judge(answers, self.bar.height)
        self.remember(judgement.accuracy, judgement.images)
        return judgement.accuracy, judgement.images

    def remember(self, accuracy: float, images: int) -> None:
        """Raise the bar by a plan that was judged on every image."""
        if images == self.session.task.images:
            self.bar.raise_by(accuracy)


def row(judges: Judges, choices: Choices) -> dict[str, Any]:
    """One plan both ways."""
    start = time.perf_counter()
    plain = judges.plainly(choices)
    middle = time.perf_counter()
    found, images = judges.as_a_search_does(choices)
    seconds = {"plain": middle - start, "search": time.perf_counter() - middle}
    return {"choices": list(choices), "plain": plain, "search": found, "images": images, "seconds": seconds}


def summary(rows: list[dict[str, Any]], images: int) -> dict[str, Any]:
    """What the rows say."""
    whole = [row for row in rows if row["images"] == images]
    rate = {way: 60 * len(rows) / sum(row["seconds"][way] for row in rows) for way in ("plain", "search")}
    ranked = [sorted(range(len(rows)), key=lambda n: -rows[n][way])[:BEST] for way in ("plain", "search")]
    tau = kendalltau([row["plain"] for row in whole], [row["search"] for row in whole]).statistic if whole else None
    return {
        "plans": len(rows),
        "candidates per minute": rate,
        "times as many": rate["search"] / rate["plain"],
        "judged to the end": len(whole),
        "the same ten best": set(ranked[0]) == set(ranked[1]),
        "Kendall's tau of those judged to the end": tau,
    }


def main() -> None:
    """Judge what is missing, write all."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    made.add_argument("--weights", type=Path, required=True, help="folder with cifar10_<model>.safetensors")
    made.add_argument("--model", default="resnet56")
    made.add_argument("--plans", type=int, default=100)
    made.add_argument("--images", type=int, default=1000)
    made.add_argument("--work", type=Path, default=Path("candidates_work"))
    options = made.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    session = prepared(options.model, options, LATENCY, engine=FakeEngine(), batch_size=100)
    judges, rng, rows = Judges(session), np.random.default_rng(0), []
    plans = [random_walk(judges.problem, rng) for _ in range(options.plans)]
    kept = options.work / f"{options.model}.jsonl"
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for number, choices in enumerate(plans):
        rows.append(known[number] if number < len(known) else row(judges, choices))
        if number < len(known):
            judges.remember(rows[-1]["search"], rows[-1]["images"])
        else:
            with kept.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        print(f"{number + 1}: {rows[-1]['plain']:.1%}, {rows[-1]['search']:.1%} of {rows[-1]['images']}", flush=True)
    body = {"summary": summary(rows, options.images), "model": options.model, "plans": rows}
    for name, value in body["summary"].items():
        print(f"{name}: {value}")
    result_file("candidates").write_text(json.dumps({**body, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
