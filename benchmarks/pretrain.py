"""Pretrains the policy that the `autosculpt` agent starts from, in imagination alone, and writes it beside the agent.

    python benchmarks/pretrain.py --data DIR [--work pretrain_work] [--updates 2400]

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets: training images alone are read. Tasks are random
networks on random machines (`practice.py`) under random budgets, on latency, FLOPs, parameters or several; none is a
model that results are published of. Plans are judged by the error table, as in the agent's own warm-up; one PPO update
after another, each on another task, with one Adam state and a learning rate that falls to `RATES[1]`; what is written
is the mean of the weights over about the last `MEMORY` updates.

Resumable: problems are kept in WORK as they are built, weights and Adam's state every `EVERY` updates. WORK/log.jsonl
gets, each time, how the policy does on held-out problems without a warm-up: its greedy plan, the best by the table of a
batch of draws, and the best of what is bred from such draws, which is what the agent tries first: the geometric mean
of the table error over the least of `dp`, `uniform` and `magnitude`, and how often what is bred beats the last two.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from practice import network, problem, rebudgeted
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import graphprune as gp
from graphprune.agents import create
from graphprune.agents.autosculpt import Search
from graphprune.agents.belief import Belief
from graphprune.agents.dp import Solver
from graphprune.agents.policies import Weights
from graphprune.agents.wall import only_plan
from graphprune.record import Record
from graphprune.searching.problem import BudgetSpent, Choices, Floats, Problem
from graphprune.searching.problem_file import pack, unpack

AGENT = Path(__file__).parents[1] / "agents" / "autosculpt.safetensors"
NETWORKS = 24
HELD_OUT = 6
FIRST_HELD_OUT = 1000
BUDGETS = (0.05, 0.8)
COSTS = (("latency",), ("latency",), ("latency",), ("flops",), ("params", "latency"))
"""What a target may speak of; one of these at random."""
TESTED = (0.15, 0.35, 0.6)
"""Budgets on latency under which the held-out problems are judged."""
RATES = (1e-3, 1e-4)
ENTROPY = (0.1, 0.02)
"""Learning rate and entropy at the beginning and at the end."""
MEMORY = 100
EVERY = 120
PERIOD = 3
"""Updates on one task before the next."""
Adam = dict[int, dict[str, torch.Tensor]]


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder with CIFAR-10")
    made.add_argument("--work", type=Path, default=Path("pretrain_work"), help="folder for problems and checkpoints")
    made.add_argument("--out", type=Path, default=AGENT)
    made.add_argument("--updates", type=int, default=2400)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--build-only", action="store_true", help="make the problems, train nothing")
    return made.parse_args()


def problems(numbers: Sequence[int], options: argparse.Namespace) -> list[Problem]:
    """The problems of some networks, read from the work folder or made."""
    paths = {number: options.work / f"problem_{number}.safetensors" for number in numbers}
    missing = [number for number, path in paths.items() if not path.exists()]
    task = gp.Task.load(f"cifar10:{options.data}") if missing else None
    for number in missing:
        assert task is not None
        made = problem(number, network(number, task), task)
        part = paths[number].with_suffix(".part")
        part.write_bytes(pack(made))
        part.rename(paths[number])
        print(f"problem {number}: {len(made.decisions)} sites", flush=True)
    return [unpack(path.read_bytes()) for path in paths.values()]


# --- training ------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """Where the training stands: weights, Adam's state by parameter, the running mean of the weights."""

    updates: int = 0
    weights: Weights | None = None
    adam: Adam | None = None
    mean: Weights | None = None

    def practise(self, task: Problem, rng: np.random.Generator, share: float) -> None:
        """`PERIOD` updates on one task; `share` of the training is over."""
        search = Search(task, rng, self.weights)
        rate, entropy = (end[0] ** (1 - share) * end[1] ** share for end in (RATES, ENTROPY))
        search.ppo.lr_schedule = lambda _: rate
        search.ppo.ent_coef = entropy
        optimiser = search.ppo.policy.optimizer
        if self.adam is not None:
            optimiser.load_state_dict({**optimiser.state_dict(), "state": self.adam})
        search.warm_up(PERIOD)
        self.updates += PERIOD
        self.weights, self.adam = search.weights(), optimiser.state_dict()["state"]
        new = min(1.0, max(PERIOD / MEMORY, PERIOD / self.updates))
        before = self.weights if self.mean is None else self.mean
        self.mean = {name: before[name].lerp(value, new) for name, value in self.weights.items()}

    def save(self, path: Path) -> None:
        """Keep all of it, in one file that is never half written."""
        assert self.weights is not None
        assert self.adam is not None
        assert self.mean is not None
        tensors = {f"weights {name}": value for name, value in self.weights.items()}
        tensors |= {f"mean {name}": value for name, value in self.mean.items()}
        tensors |= {f"adam {n} {name}": value for n, own in self.adam.items() for name, value in own.items()}
        save_file(tensors, path.with_suffix(".part"), {"updates": str(self.updates)})
        path.with_suffix(".part").rename(path)

    @classmethod
    def load(cls, path: Path) -> "Training":
        """Go on from there, or begin."""
        if not path.exists():
            return cls()
        tensors, adam = load_file(path), {}
        with safe_open(path, "pt") as file:
            updates = int(file.metadata()["updates"])
        for name in [name for name in tensors if name.startswith("adam ")]:
            _, number, field = name.split(" ")
            adam.setdefault(int(number), {})[field] = tensors[name]
        weights, mean = (
            {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in ("weights ", "mean ")
        )
        return cls(updates, weights, adam, mean)


def drawn(pool: Sequence[Problem], rng: np.random.Generator) -> Problem:
    """A random task with something to decide."""
    while True:
        whole = pool[int(rng.integers(len(pool)))]
        task = rebudgeted(whole, rng.uniform(*BUDGETS), COSTS[int(rng.integers(len(COSTS)))])
        if only_plan(task) is None:
            return task


# --- how good it is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A held-out problem under a budget, and the table errors of plans that need no policy."""

    task: Problem
    optimum: float
    uniform: float
    magnitude: float


def trials(pool: Sequence[Problem]) -> list[Trial]:
    """Every held-out problem under every tested budget."""
    made = []
    for whole, share in product(pool, TESTED):
        task = rebudgeted(whole, share)
        best = Solver(task).solve()
        rivals = [min(map(task.error, proposed(name, task))) for name in ("uniform", "magnitude")]
        made.append(Trial(task, min(rivals if best is None else [task.error(best), *rivals]), *rivals))
    return made


def proposed(agent: str, task: Problem) -> list[Choices]:
    """The plans of an agent that needs no answer."""
    asked: list[Choices] = []

    def evaluator(choices: Choices) -> Record:
        asked.append(choices)
        return Record(task.plan(choices), accuracy=0.0)

    with suppress(BudgetSpent):
        asking = replace(task, evaluator=evaluator, trials=10**6, records=[], _seen={})
        create(agent).run(asking, np.random.default_rng(0))
    return asked


def assess(weights: Weights | None, held_out: Sequence[Trial]) -> dict[str, float]:
    """First plans without any update on the new problem."""
    rows = []
    for trial in held_out:
        search = Search(trial.task, np.random.default_rng(0), weights)
        errors, bred = (
            trial.task.error.batch(plans)
            for plans in (search.own_plans(), search.first_plans(Belief(trial.task, power=1.0)))
        )
        rows.append((errors[0], errors.min(), bred.min(), trial.optimum, trial.uniform, trial.magnitude))
    greedy, drawn, bred, optimum, uniform, magnitude = np.maximum(np.array(rows), 1e-9).T

    def ratio(values: Floats) -> float:
        return round(float(np.exp(np.log(values / optimum).mean())), 4)

    return {
        "greedy": ratio(greedy), "best drawn": ratio(drawn), "bred": ratio(bred), "uniform": ratio(uniform),
        "magnitude": ratio(magnitude), "beats uniform": float((bred < uniform).mean()),
        "beats magnitude": float((bred < magnitude * (1 - 1e-9)).mean()),
        "no worse than magnitude": float((bred <= magnitude * (1 + 1e-9)).mean()),
    }  # fmt: skip


def main() -> None:
    """Build what is missing, train what is left, write the policy."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pool = problems(range(NETWORKS), options)
    held_out = trials(problems(range(FIRST_HELD_OUT, FIRST_HELD_OUT + HELD_OUT), options))
    if options.build_only:
        return
    state = Training.load(options.work / "training.safetensors")
    start = time.process_time()
    while state.updates < options.updates:
        rng = np.random.default_rng([options.seed, state.updates])  # so a resumed training draws the same
        state.practise(drawn(pool, rng), rng, state.updates / options.updates)
        if state.updates // EVERY > (state.updates - PERIOD) // EVERY or state.updates >= options.updates:
            state.save(options.work / "training.safetensors")
            seconds = round(time.process_time() - start)
            line = {"updates": state.updates, "seconds": seconds, **assess(state.mean, held_out)}
            with (options.work / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
    assert state.mean is not None
    save_file({name: value.contiguous() for name, value in state.mean.items()}, options.out)


if __name__ == "__main__":
    main()
