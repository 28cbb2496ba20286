"""`prune` and `finetune`: from a dense model to a folder with a faster one."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

import graphprune as gp
from graphprune.commands import base, outcome
from graphprune.commands.base import (
    Answer,
    Batch,
    Calibration,
    Data,
    EngineName,
    Folder,
    InputSize,
    Model,
    OwnModel,
    Threads,
    Verb,
    Weights,
)
from graphprune.commands.console import Bars
from graphprune.errors import InputError
from graphprune.files.layout import STUDY

if TYPE_CHECKING:
    from graphprune.agents.base import Agent

_TARGET = "Target (at least one; several may be combined)"


def _bound(text: str, metavar: str = "SHARE") -> object:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=_TARGET)


@dataclass(frozen=True, kw_only=True)
class Prune(Verb):
    """Search the best pruned MODEL that meets a target, fine-tune it, export it and prove the speed-up.

    DIR then holds dense.onnx, pruned.onnx, plan.json, model.safetensors, result.json and report.html. A run that was
    stopped goes on where it was when the same command is given again.

    Example: graphprune prune 'timm:resnet18?num_classes=5' --weights my.safetensors --data imagefolder:photos
    --latency 0.5 --epochs 20. An ONNX file alone will do: graphprune prune model.onnx --calibration images.npy
    --latency 0.6
    """

    stopped: ClassVar[str] = "stopped; every finished trial is kept: give the same command again to go on from there"

    model: Model
    data: Data = None
    calibration: Calibration = None
    weights: Weights = None
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("out")

    latency: Annotated[float | None, _bound("Measured latency as a share of the dense model's, e.g. 0.5.")] = None
    flops: Annotated[float | None, _bound("FLOPs as a share of the dense model's.")] = None
    params: Annotated[float | None, _bound("Parameters as a share of the dense model's.")] = None
    latency_ms: Annotated[float | None, _bound("Latency of a run in milliseconds.", "MS")] = None
    flops_g: Annotated[float | None, _bound("FLOPs in billions (a multiply-add counts as 2).", "GFLOPS")] = None
    params_m: Annotated[float | None, _bound("Parameters in millions.", "MILLIONS")] = None

    agent: Annotated[str, typer.Option(metavar="NAME", help="Who searches: autosculpt, dp, random, ...")] = "autosculpt"
    rivals: Annotated[
        str, typer.Option(metavar="NAMES", help="Agents to compare with, e.g. uniform,dp.", show_default=False)
    ] = ""
    transfer: Annotated[
        str | None,
        typer.Option(metavar="STUDY", help="Start from the trials of earlier searches: DIR, FILE or URL. For amc."),
    ] = None
    augment: Annotated[
        bool, typer.Option("--augment", help="Practise on the models of --transfer first, at many budgets. For amc.")
    ] = False
    assistant: Annotated[
        bool, typer.Option("--assistant", help="Evaluate only what the trials so far let hope for. For amc.")
    ] = False
    patterns: Annotated[
        str | None, typer.Option(metavar="NAMES", help="What may be cut, e.g. filter,kernel. Default: every pattern.")
    ] = None
    trials: Annotated[int, typer.Option(metavar="N", help="Plans that may be evaluated.")] = 200
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the search and of the data slices.")] = 0
    epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of fine-tuning afterwards; 0: none.")] = 10
    test: Annotated[bool, typer.Option("--test", help="Read the test set, once, for the final table.")] = False
    study: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where trials are stored. Default: study.db in --out.")
    ] = None
    engine: EngineName = "onnxruntime"
    threads: Threads = 1
    batch: Batch = 1
    input_size: InputSize = None

    def run(self) -> Answer:
        """Search, fine-tune, deliver."""
        from graphprune import delivery, models
        from graphprune.commands import steps
        from graphprune.training.recipe import Recipe

        target, engine = self._target(), base.engine(self.engine, threads=self.threads, batch=self.batch)
        if self.epochs < 0 or self.trials < 1:
            raise InputError("--epochs must be at least 0 and --trials at least 1")
        agent, data = self._agent(), base.named_data(self.data, self.calibration)
        dense = models.create(self.model, self.weights).eval()
        task = steps.load_task(data, self.model, dense, self.input_size, self.seed)
        with Bars() as bars:
            result = gp.search(
                dense,
                task,
                target,
                agent,
                self.trials,
                self.seed,
                engine=engine,
                study=self.study or self.out / STUDY,
                rivals=_names(self.rivals),
                patterns=None if self.patterns is None else _names(self.patterns),
                progress=bars.update,
            )
            result = replace(result, spec=self.model, notes=(*self._warnings(), *result.notes))
            found = result.record
            if self.epochs:
                recipe = Recipe(epochs=self.epochs, seed=self.seed)
                result = steps.tune(result, task, recipe, self.out, bars.epochs("finetune", self.epochs))
            delivered = delivery.deliver(result, self.out, engine, bars.update, title=f"{self.model} on {data}")
        answer = outcome.answer(delivered, steps.accuracies(delivered.result, task, self.test))
        return outcome.with_rivals(answer, delivered, found) if delivered.result.rivals else answer

    def _target(self) -> "gp.Target":
        bounds = {bound.name: getattr(self, bound.name) for bound in fields(gp.Target)}
        if all(bound is None for bound in bounds.values()):
            raise InputError("no target is given: add for example --latency 0.5 (half of the dense model's)")
        return gp.Target(**bounds)

    def _agent(self) -> "Agent":
        """Who searches, with what it takes from earlier searches."""
        from graphprune import registry
        from graphprune.searching.past import History

        if self.augment and self.transfer is None:
            raise InputError("--augment practises on the models of earlier searches: add --transfer STUDY")
        if self.transfer is None and not self.assistant:
            return registry.agent(self.agent)
        history = History(self.transfer, self.transfer is not None, self.augment, self.assistant)
        return registry.agent(self.agent, history=history)

    def _warnings(self) -> tuple[str, ...]:
        from graphprune import models

        spec = models.parse(self.model)
        if self.weights is not None or spec.pretrained or spec.library in ("", "onnx"):
            return ()
        return ("the dense model is untrained: neither --weights nor pretrained=True is given",)


def _names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class Finetune(Verb):
    """Fine-tune the pruned model in DIR further, by distillation from its dense model, and write DIR anew."""

    stopped: ClassVar[str] = "stopped; every finished epoch is kept: give the same command again to go on from there"

    folder: Folder
    data: Data = None
    calibration: Calibration = None
    epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of training.")] = 30
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The dense model's weights. Default: dense.safetensors in DIR."),
    ] = None
    model: OwnModel = None
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the training and of the data slices: that of prune.")
    ] = 0
    test: Annotated[bool, typer.Option("--test", help="Read the test set, once, for the final table.")] = False
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="NAME", help="What latency means. Default: as in the search.")
    ] = None
    threads: Annotated[int | None, typer.Option(metavar="N", help="Its threads. Default: as in the search.")] = None
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Images in a timed run. Default: as in the search.")
    ] = None

    def run(self) -> Answer:
        """Restore, fine-tune, deliver."""
        from graphprune import delivery, engines
        from graphprune.commands import steps
        from graphprune.training.recipe import Recipe

        result = delivery.restore(self.folder, self.model, self.weights)
        measured = result.record.measured
        searched = engines.settings_in(measured.engine if measured else "")
        asked: dict[str, Any] = {"name": self.engine, "threads": self.threads, "batch": self.batch}
        engine = base.engine(**{name: searched[name] if value is None else value for name, value in asked.items()})
        size = result.graph.inputs[0][1][-1]
        data = base.named_data(self.data, self.calibration)
        task = steps.load_task(data, result.spec, result.dense, size, self.seed)
        with Bars() as bars:
            recipe = Recipe(epochs=self.epochs, seed=self.seed)
            result = steps.tune(result, task, recipe, self.folder, bars.epochs("finetune", self.epochs))
            delivered = delivery.deliver(result, self.folder, engine, bars.update, title=f"{result.spec}, {data}")
        return outcome.answer(delivered, steps.accuracies(delivered.result, task, self.test))
