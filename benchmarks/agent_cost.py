"""What share of a search's time the agent itself takes, beside the candidates that it has evaluated.

    python benchmarks/agent_cost.py --data DIR --weights DIR [--model resnet56] [--agent autosculpt] [--trials 60]

CIFAR-10, half of the latency, one thread, a process of its own. DATA is torchvision's CIFAR-10 folder or a folder of
WebP sheets, WEIGHTS a folder with cifar10_<model>.safetensors. The engine computes its times (`FakeEngine`): measuring
the candidates that would become the best takes next to nothing here, and so the agent's share is an upper bound.

From the agent's first step to its last: seconds within the evaluator, and what is left, which for `autosculpt` is taken
apart into its policy's updates, decoding, the belief (fits and predictions, also those made within updates) and the
rest. Trace, tables and verification are no part of it. The aim is a share below `AIM` of the time on the wall; the
share of processor time stands beside it, which a busy machine disturbs less. Writes
`results/agent_cost-<engine>-1t-<processor>.json`, with the seconds of every trial.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import RESULTS, in_own_process, prepared, result_file

from graphprune.agents import create
from graphprune.agents.autosculpt import Search
from graphprune.agents.base import Agent
from graphprune.agents.belief import Belief
from graphprune.engines.fake import FakeEngine
from graphprune.machine import environment
from graphprune.searching.problem import Floats, Problem

LATENCY = 0.5
AIM = 0.2
EVALUATOR, REST = "evaluator", "rest of the agent"
PARTS: tuple[tuple[type, str, str], ...] = (
    (Search, "_update", "policy updates"),
    (Search, "decode", "decoding"),
    (Belief, "learn", "belief: fits"),
    (Belief, "supposing", "belief: fits"),
    (Belief, "predict", "belief: predictions"),
)
"""Which methods of the main agent are timed, and as what."""


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Clock:
    """Seconds of named functions, by each of `CLOCKS`; what one of them spends within another counts for the inner one
    alone.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, Floats] = defaultdict(lambda: np.zeros(len(CLOCKS)))
        self.calls: dict[str, int] = defaultdict(int)
        self._running: list[Floats] = []
        """Of each timed function that runs, the outermost first: the seconds spent within other timed ones."""

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time counted under a name."""

        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            self._running.append(np.zeros(len(CLOCKS)))
            start = _now()
            try:
                return function(*arguments, **options)
            finally:
                whole = _now() - start
                self.seconds[name] += whole - self._running.pop()
                self.calls[name] += 1
                if self._running:
                    self._running[-1] += whole

        return run


def _now() -> Floats:
    return np.array([clock() for clock in CLOCKS.values()])


class Watched:
    """An agent whose time is counted, and that of the evaluator apart from it."""

    def __init__(self, agent: Agent, clock: Clock) -> None:
        self.agent, self.clock, self.name = agent, clock, agent.name

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search as the agent does."""
        problem.evaluator = self.clock.timed(EVALUATOR, problem.evaluator)
        with ExitStack() as stack:
            for owner, method, name in PARTS:
                timed = self.clock.timed(name, getattr(owner, method))
                stack.enter_context(patch.object(owner, method, timed))
            self.clock.timed(REST, self.agent.run)(problem, rng)


def examine(options: argparse.Namespace) -> dict[str, Any]:
    """One search."""
    session = prepared(options.model, options, LATENCY, engine=FakeEngine(), batch_size=100)
    clock = Clock()
    problem = session.solve(Watched(create(options.agent), clock), options.trials, options.seed)
    parts = {name: dict(zip(CLOCKS, spent.tolist(), strict=True)) for name, spent in clock.seconds.items()}
    whole = {kind: sum(part[kind] for part in parts.values()) for kind in CLOCKS}
    return {
        "model": options.model, "agent": options.agent, "seed": options.seed, "images": options.images,
        "trials": options.trials, "evaluated": len(problem.records), "sites": len(problem.decisions),
        "seconds": whole, "parts": parts, "calls": dict(clock.calls),
        "share": {kind: 1 - parts[EVALUATOR][kind] / whole[kind] for kind in CLOCKS},
        "seconds_of_trials": [record.seconds for record in problem.records],
    }  # fmt: skip


def told(found: dict[str, Any]) -> str:
    """The shares, and whether the aim is reached."""
    shares = ", ".join(f"{found['share'][kind]:.1%} of {found['seconds'][kind]:.1f} s ({kind})" for kind in CLOCKS)
    return f"{shares}: {'reached' if found['share']['wall'] < AIM else 'missed'}"


def main() -> None:
    """Search, print, write."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    made.add_argument("--weights", type=Path, required=True, help="folder with cifar10_<model>.safetensors")
    made.add_argument("--model", default="resnet56")
    made.add_argument("--agent", default="autosculpt")
    made.add_argument("--trials", type=int, default=60)
    made.add_argument("--images", type=int, default=1000, help="validation images")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = made.parse_args()
    found = in_own_process(examine, options)
    for name, part in sorted(found["parts"].items(), key=lambda entry: -entry[1]["wall"]):
        cells = "  ".join(f"{part[kind]:8.1f} s {part[kind] / found['seconds'][kind]:6.1%}" for kind in CLOCKS)
        print(f"{name:20} {cells}  {found['calls'][name]} calls")
    print(f"of {found['evaluated']} trials the agent takes " + told(found))
    body = {"aim": AIM, **found, "environment": environment()}
    result_file("agent_cost", options.out).write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
