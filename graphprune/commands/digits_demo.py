"""The demo: scanned digits, a ResNet-20 trained on the spot, and the whole job up to the measured speed-up."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from graphprune import delivery, models
from graphprune.commands import steps
from graphprune.commands.console import Bars
from graphprune.delivery import Delivery
from graphprune.engines.base import Engine
from graphprune.files.layout import STUDY, TRAINING
from graphprune.randomness import seeded
from graphprune.record import Record
from graphprune.searching.search import search
from graphprune.target import Target
from graphprune.tasks.task import Task
from graphprune.training.finetune import train
from graphprune.training.recipe import Recipe

SPEC = "cifar:resnet20?num_classes=10"
RIVALS = ("uniform", "random", "dp")


@dataclass(frozen=True)
class Settings:
    """How long the demo takes and what it asks for: `latency` is the target's share of the dense model's."""

    trials: int
    latency: float = 0.5
    dense_epochs: int = 9
    epochs: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Shown:
    """What the demo shows: the delivery, accuracies (dense, pruned), and AutoSculpt's record before fine-tuning."""

    delivery: Delivery
    scores: steps.Scores
    found: Record


def run(folder: Path, settings: Settings, engine: Engine, bars: Bars) -> Shown:
    """Train, search with AutoSculpt and its rivals, fine-tune, deliver; the test set is read once per row.

    A run that was stopped goes on from what it left in `folder`.
    """
    task = Task.load("digits", batch_size=64)
    dense = dense_model(task, settings, folder / TRAINING, bars.epochs("train", settings.dense_epochs))
    result = search(
        dense,
        task,
        Target(latency=settings.latency),
        "autosculpt",
        settings.trials,
        settings.seed,
        engine=engine,
        study=folder / STUDY,
        rivals=RIVALS,
        progress=bars.update,
    )
    result = replace(result, spec=SPEC)
    recipe = Recipe(epochs=settings.epochs, seed=settings.seed)
    tuned = steps.tune(result, task, recipe, folder, bars.epochs("finetune", settings.epochs))
    delivered = delivery.deliver(tuned, folder, engine, bars.update, title="graphprune demo: ResNet-20 on digits")
    return Shown(delivered, steps.accuracies(delivered.result, task, test=True), result.record)


def dense_model(
    task: Task, settings: Settings, checkpoint: Path, progress: Callable[[int, float, float], None]
) -> nn.Module:
    """A ResNet-20 trained on the task's labels; the checkpoint makes a second run start where the first one ended."""
    with seeded(settings.seed):
        model = models.create(SPEC)
    recipe = Recipe(epochs=settings.dense_epochs, seed=settings.seed)
    return train(model, task, recipe, checkpoint=checkpoint, progress=progress).model
