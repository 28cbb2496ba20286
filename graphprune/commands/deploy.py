"""`export` and `bench`: ONNX files, and how fast they are against each other."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import graphprune as gp
from graphprune.commands import base
from graphprune.commands.base import Answer, Batch, EngineName, InputSize, OwnModel, Threads, Verb, Weights
from graphprune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Export a model to an ONNX file, checked in ONNX Runtime against torch.

    SOURCE is a folder that prune, finetune or demo wrote (its pruned model), or a model spec (with --weights).
    """

    source: Annotated[str, typer.Argument(metavar="SOURCE", help="DIR or MODEL.", show_default=False)]
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")] = Path("model.onnx")
    weights: Weights = None
    model: OwnModel = None
    input_size: InputSize = None
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Batch 1 only, not any batch size.")] = False

    def run(self) -> Answer:
        """Load or build the model, export it."""
        from graphprune import delivery, models
        from graphprune.cutting import surgery

        if Path(self.source).is_dir():
            if self.weights is not None or self.input_size is not None:
                raise InputError("--weights and --input-size belong to a MODEL; a folder has its own")
            model = delivery.load(Path(self.source), self.model)
            inputs = delivery.read_plan(Path(self.source)).inputs
        else:
            model = models.create(self.source, self.weights)
            inputs = (("float32", base.input_shape(self.source, model, self.input_size)),)
        batch = 1 if self.fixed_batch else 2
        file = gp.export_onnx(model, self.out, surgery.example_inputs(inputs, batch), not self.fixed_batch)
        size = file.stat().st_size
        shapes = [list(shape) for _, shape in inputs]
        facts = {"file": str(file), "bytes": size, "inputs": shapes, "dynamic_batch": not self.fixed_batch}
        return Answer(facts, (f"{file}: {size / 1e6:.2f} MB, ONNX Runtime and torch agree",))


@dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Time ONNX files against the first of them, in turns, in a fresh process.

    A difference is called faster or slower only where the 95 % interval of the ratio is clear of the noise.
    """

    files: Annotated[list[Path], typer.Argument(metavar="A.onnx B.onnx ...", help="ONNX files.", show_default=False)]
    rounds: Annotated[int, typer.Option(metavar="N", help="Samples of each file.")] = 50
    engine: EngineName = "onnxruntime"
    threads: Threads = 1
    batch: Batch = 1
    provider: Annotated[
        str | None, typer.Option(metavar="NAME", help="ONNX Runtime's execution provider.", show_default=False)
    ] = None

    def run(self) -> Answer:
        """Measure."""
        from graphprune.delivery import timed

        chosen = {} if self.provider is None else {"provider": self.provider}
        engine = base.engine(self.engine, threads=self.threads, batch=self.batch, **chosen)
        measurement = timed(self.files, engine, self.rounds)
        for name, timing in zip(measurement.names, measurement.timings, strict=True):
            if timing.error is not None:
                raise InputError(timing.error if name in timing.error else f"{name}: {timing.error}")
        table = Table(title=measurement.engine, title_justify="left")
        table.add_column("model")
        for heading in ("median ms", "speed-up", "95 % interval", "verdict"):
            table.add_column(heading, justify="right")
        told = json.loads(measurement.to_json())
        for number, model in enumerate(told["models"]):
            low, high = model["interval"]
            compared = (f"{1 / model['share']:.2f}x", f"{1 / high:.2f} to {1 / low:.2f}", model["verdict"])
            table.add_row(model["name"], f"{1e3 * model['median']:.4f}", *(compared if number else ()))
        return Answer(told, (table,))
