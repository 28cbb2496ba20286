"""Fine-tunes what was planned: every row alike. Needs torch, torchvision and timm only, so that a GPU can do it."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import zoo
from device_data import on_device, prepare_device
from headline_rows import Candidate, Row, rows
from torch import nn

from graphprune.files import atomic, tensors
from graphprune.machine import environment
from graphprune.tasks.task import Task
from graphprune.training.recipe import Recipe
from graphprune.training.training import Checkpoint, Trained, fit


def recipe_for(model: nn.Module, epochs: int, rate: float, seed: int) -> Recipe:
    """The same recipe for all, with teacher or without, at a share `rate` of a new network's learning rate."""
    recipe = Recipe(epochs, seed=seed)
    return replace(recipe, lr=rate * recipe.optimizer_options(model, from_scratch=True)["lr"])


def tune(options: argparse.Namespace) -> None:
    """Every row, block and seed that is not there yet."""
    prepare_device()
    task = Task.load(f"cifar10:{options.data}", validation=options.validation, batch_size=options.batch)
    for name in options.models:
        network = zoo.NETWORKS[name]
        tuner = Tuner(on_device(task, options.images, network.randaugment), options, _teacher(options.work, name))
        for row in rows(options.work, [name], options.methods, options.speedups):
            tuner.choose(row)
            for block in [block for block in row.blocks if block in options.blocks]:
                for seed in range(options.seeds):
                    tuner.tune(row, block, seed)


def _teacher(work: Path, name: str) -> nn.Module:
    folder = work / name / "dense" / "only"
    if not folder.exists():
        raise SystemExit(f"{folder} is not there: run `headline.py plan --models {name}` first")
    return Candidate.read(folder).network()


class Tuner:
    """Tunes the rows of one network; `dense` teaches."""

    def __init__(self, task: Task, options: argparse.Namespace, dense: nn.Module) -> None:
        self.task, self.options, self.dense = task, options, dense

    def choose(self, row: Row) -> None:
        """Tune all candidates of a row shortly, where there are several."""
        usable = row.usable
        for candidate in usable if len(usable) > 1 else ():
            if not candidate.short.exists():
                trained = self._fit(candidate, "distilled", 0, self.options.short, candidate.folder / "short")
                facts = {"validation": trained.accuracy, "epochs": self.options.short}
                atomic.write_text(candidate.short, json.dumps(facts) + "\n")

    def tune(self, row: Row, block: str, seed: int) -> None:
        """Tune the chosen candidate of a row, and write its weights and how it went."""
        file, candidate = row.tuned(block, seed), row.chosen
        if candidate is None or file.with_suffix(".json").exists():
            return
        file.parent.mkdir(exist_ok=True)
        trained = self._fit(candidate, block, seed, self.options.epochs, file)
        recipe = asdict(recipe_for(trained.model, self.options.epochs, self.options.rate, seed))
        facts = {
            "candidate": candidate.folder.name, "validation": trained.accuracy, "history": trained.history,
            "recipe": recipe, "batch": self.options.batch,
            "images": self.options.images, "setting": str(trained.setting), "environment": environment(),
        }  # fmt: skip
        atomic.write_bytes(file, tensors.to_bytes(trained.model))
        atomic.write_text(file.with_suffix(".json"), json.dumps(facts) + "\n")

    def _fit(self, candidate: Candidate, block: str, seed: int, epochs: int, file: Path) -> Trained:
        facts, model = candidate.facts, candidate.network()
        name = f"{facts['model']} {facts['method']} {facts['speedup']} {facts['variant']} {block} {seed}"
        checkpoint = file.with_suffix(".checkpoint")

        def progress(epoch: int, loss: float, accuracy: float) -> None:
            print(f"{name}: epoch {epoch}/{epochs}, loss {loss:.3f}, validation {accuracy:.2%}", flush=True)

        teacher = self.dense if block == "distilled" else None
        recipe = recipe_for(model, epochs, self.options.rate, seed)
        trained = fit(model, self.task, recipe, teacher, Checkpoint(checkpoint, name), progress)
        checkpoint.unlink()
        return trained
