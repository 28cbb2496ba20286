"""The training loop: timm's optimiser, schedule and weight average, an optional teacher, exact resume."""

import copy
import math
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from graphprune.errors import InputError, StepError
from graphprune.randomness import derive, seeded
from graphprune.tasks.task import Data, Task
from graphprune.training.recipe import Recipe, repair_batch_norm
from graphprune.training.setting import Runner, Setting, fastest
from graphprune.training.snapshot import Snapshot, load_module, load_optimizer, module_tensors, optimizer_state

Progress = Callable[[int, float, float], None]
"""Called after each epoch with its number (from 1), its mean loss and the validation accuracy."""
History = tuple[tuple[int, float, float], ...]
TICKS = 1000
"""Steps of the learning rate's schedule in one epoch, however many batches it has."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network in eval mode, its validation accuracy, (epoch, loss, accuracy) per epoch, and the setting."""

    model: nn.Module
    accuracy: float
    history: History
    setting: Setting


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is stored after each epoch, and what it trains: a file of something else is refused."""

    path: Path
    identity: str


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a copy of the model; of its last and its averaged weights, those that validate better are kept.

    If the checkpoint's file exists, the run goes on from there; on a CPU the weights are then those of a run that never
    stopped, bit by bit. Raises InputError when it belongs to another run and for a task without training data,
    StepError when nothing can be trained or the loss is no longer finite.
    """
    if task.train is None:
        raise InputError(f"task {task.name!r} has no training data")
    device = _device(model)
    facts = {
        "recipe": asdict(recipe),
        "identity": checkpoint.identity if checkpoint else "",
        "taught": teacher is not None,
    }
    stored = _stored(checkpoint.path, facts) if checkpoint is not None and checkpoint.path.exists() else None
    student = copy.deepcopy(model)
    repair_batch_norm(student)
    setting = Setting(**stored.facts["setting"]) if stored is not None else _choose_setting(student, task.train, recipe)
    run = _Run(student, teacher, task, recipe, setting)
    if stored is not None:
        run.restore(stored)
    while len(run.history) < recipe.epochs:
        run.epoch(task.train)
        if checkpoint is not None:
            run.snapshot(facts).write(checkpoint.path)
        if progress is not None:
            progress(*run.history[-1])
    averaged = run.scores[1] > run.scores[0]
    trained = run.average.module if averaged else run.student
    trained.to(device).to(memory_format=torch.contiguous_format)
    return Trained(trained.eval(), max(run.scores), run.history, setting)


def _stored(path: Path, facts: dict[str, Any]) -> Snapshot:
    stored = Snapshot.read(path)
    if any(stored.facts.get(key) != value for key, value in facts.items()):
        raise InputError(f"{path} belongs to another run; remove it or choose another checkpoint")
    return stored


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None or not any(parameter.requires_grad for parameter in model.parameters()):
        raise StepError("the model has no trainable parameters")
    return parameter.device


def _choose_setting(student: nn.Module, batches: Callable[[int], Data], recipe: Recipe) -> Setting:
    if recipe.precision == "float32":
        return Setting.plain()
    with seeded(recipe.seed):
        for inputs, _ in batches(recipe.seed):
            return fastest(student, inputs)
    raise InputError("the training data is empty")


class _Run:
    """A training run between two epochs. `scores` are the validation accuracies of the weights and of their average."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, task: Task, recipe: Recipe, setting: Setting):
        self.task, self.recipe, self.setting = task, recipe, setting
        self.student = setting.place(student)
        teacher = None if teacher is None else setting.place(copy.deepcopy(teacher)).eval().requires_grad_(False)
        options = recipe.optimizer_options(student, from_scratch=teacher is None)
        self.optimizer = create_optimizer_v2(self.student, **options)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe.epochs * TICKS,
            lr_min=options["lr"] / 1000,
            warmup_t=round(recipe.warmup * recipe.epochs * TICKS),
            warmup_lr_init=options["lr"] / 100,
        )
        self.average = ModelEmaV3(self.student, decay=recipe.ema_decay, use_warmup=True)
        self.answer = Runner(self.student, setting)
        self.teach = None if teacher is None else Runner(teacher, setting)
        self.updates = 0
        self.history: History = ()
        self.scores = (0.0, 0.0)

    def epoch(self, batches: Callable[[int], Data]) -> None:
        """Train for one epoch, then judge both sets of weights."""
        number = len(self.history)
        seed = derive(self.recipe.seed, number)
        losses: list[Tensor] = []
        with seeded(seed):
            epoch = batches(seed)
            steps = len(epoch) if isinstance(epoch, Sized) else math.inf  # without a length the rate moves per epoch
            self.student.train()
            for step, (inputs, targets) in enumerate(epoch):
                self.scheduler.step(int((number + step / steps) * TICKS))
                losses.append(self._step(inputs, targets))
        if not losses:
            raise InputError(f"task {self.task.name!r} has no training data")
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise StepError(f"training diverged: the loss of epoch {number + 1} is {loss}; lower the learning rate")
        self.scores = self.task.accuracy(self.student), self.task.accuracy(self.average.module)
        self.history = (*self.history, (number + 1, loss, max(self.scores)))

    def _step(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        inputs = self.setting.inputs(inputs)
        targets = None if targets is None else targets.to(self.setting.device)
        with torch.no_grad():
            taught = None if self.teach is None else self.teach(inputs)
        loss = self.recipe.loss(self.answer(inputs), targets, taught)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.updates += 1
        self.average.update(self.student, self.updates)
        return loss.detach()

    def snapshot(self, facts: dict[str, Any]) -> Snapshot:
        """The state after the last epoch; `facts` say which run it is."""
        tensors, optimizer = optimizer_state(self.optimizer)
        tensors |= module_tensors("model", self.student) | module_tensors("average", self.average.module)
        progress = {"history": self.history, "scores": self.scores, "updates": self.updates}
        return Snapshot(tensors, {**facts, **progress, "optimizer": optimizer, "setting": asdict(self.setting)})

    def restore(self, stored: Snapshot) -> None:
        """Go back to a snapshot. Raises InputError when its tensors are another network's."""
        load_module(self.student, stored.part("model"))
        load_module(self.average.module, stored.part("average"))
        load_optimizer(self.optimizer, stored.part("optimizer"), stored.facts["optimizer"])
        self.history = tuple((int(epoch), loss, accuracy) for epoch, loss, accuracy in stored.facts["history"])
        self.scores = (stored.facts["scores"][0], stored.facts["scores"][1])
        self.updates = stored.facts["updates"]
