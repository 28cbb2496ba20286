"""`trace` and `profile`: what a model is made of, what may be cut, and what the engine would gain from it."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.table import Table
from rich.text import Text

import graphprune as gp
from graphprune.commands import base
from graphprune.commands.base import Answer, Batch, EngineName, InputSize, Model, Threads, Verb, Weights
from graphprune.commands.console import Bars
from graphprune.errors import InputError

if TYPE_CHECKING:
    from graphprune.coupling.graph import ModelGraph
    from graphprune.timing.profile import Profile as OperatorProfile


@dataclass(frozen=True, kw_only=True)
class Trace(Verb):
    """Show what can be cut in MODEL: what is cut together, where decisions are taken, what is frozen and why."""

    model: Model
    weights: Weights = None
    input_size: InputSize = None
    gains: Annotated[
        bool, typer.Option("--gains", help="Show measured gains; what this machine has not timed yet is timed now.")
    ] = False
    engine: EngineName = "onnxruntime"
    threads: Threads = 1
    batch: Batch = 1
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the layers, coloured by what is cut together.")
    ] = None

    def run(self) -> Answer:
        """Trace, print the tables, draw the picture."""
        from graphprune.reporting.picture import write_picture

        if self.picture is not None and self.picture.suffix != ".svg":
            raise InputError(f"the picture is an SVG file: give --picture a name that ends in .svg, not {self.picture}")
        graph = traced(self.model, self.weights, self.input_size)
        if self.picture is not None:
            write_picture(graph, self.picture)
        profile = operator_profile(self.engine, self.threads, self.batch) if self.gains else None
        if profile is not None:
            measure_all(graph, profile)
        sites = graph.sites(profile)
        frozen = [group for group in graph.all_groups if group.frozen]
        facts = {
            "model": self.model,
            "signature": graph.signature,
            "flops": graph.flops,
            "params": graph.parameter_count,
            "layers": len(graph.layers),
            "groups": [asdict(group) for group in graph.all_groups],
            **sites.to_dict(),
        }
        head = (
            f"{self.model}: {len(graph.layers)} layers, {graph.flops / 1e6:.1f} M FLOPs, "
            f"{graph.parameter_count / 1e3:.1f} k weights; {len(graph.all_groups)} groups ({len(frozen)} frozen), "
            f"{len(graph.all_sites)} sites"
        )
        written = (f"written to {self.picture}",) if self.picture is not None else ()
        return Answer(facts, (head, Text(str(graph.groups())), Text(str(sites)), *written))


@dataclass(frozen=True, kw_only=True)
class Profile(Verb):
    """Time the layers of MODEL, dense and under each pattern, and keep the times for this machine.

    Without MODEL: typical layers, which takes up to three minutes for the first time.
    """

    stopped: ClassVar[str] = "stopped; all times measured so far are kept"

    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=base.MODELS, show_default=False)] = None
    input_size: InputSize = None
    engine: EngineName = "onnxruntime"
    threads: Threads = 1
    batch: Batch = 1
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what patterns gain as a heat map: FILE.png, .svg or .pdf.")
    ] = None

    def run(self) -> Answer:
        """Measure, print what each layer costs and what each level of each pattern gains."""
        from graphprune.registry import patterns
        from graphprune.reporting import grid, heatmap

        if self.picture is not None:
            heatmap.check(self.picture)
        profile = operator_profile(self.engine, self.threads, self.batch)
        with Bars() as bars:
            graphs = self._graphs(bars)
            cells = grid.cells(graphs, profile, list(patterns().values()), bars.stage("profile"))
        facts: dict[str, Any] = {
            "engine": profile.engine.identity,
            "cache": str(profile.cache),
            "block": profile.block,
            "noise": profile.noise,
            "cells": [cell.to_dict() for cell in cells],
        }
        title = f"{self.model or 'typical layers'}, {profile.engine.identity}"
        picture = () if self.picture is None else (f"picture: {heatmap.draw(cells, self.picture, title)}",)
        gains = Text(grid.table(cells))
        if self.model is None:
            return Answer(facts, (_about(profile), gains, *picture))
        (graph,) = graphs.values()
        times = {layer.node: profile.seconds(layer.operator) for layer in graph.layers}
        layers = {node: None if math.isnan(seconds) else seconds for node, seconds in times.items()}
        facts |= {"model": self.model, "layers": layers, **graph.sites(profile).to_dict()}
        return Answer(facts, (_about(profile), _layer_table(graph, times), gains, *picture))

    def _graphs(self, bars: Bars) -> "dict[str, ModelGraph]":
        from graphprune.reporting import grid

        if self.model is not None:
            return {"": traced(self.model, None, self.input_size)}
        return grid.typical_graphs(bars.stage("trace"))


def operator_profile(engine: str, threads: int, batch: int) -> "OperatorProfile":
    """The machine's profile for an engine with this many threads, at this batch."""
    from graphprune.timing.profile import Profile

    return Profile(base.engine(engine, threads=threads, batch=batch))


def traced(spec: str, weights: Path | None, size: int | None) -> "ModelGraph":
    """The graph of a model at the input size that it declares, or at `size`."""
    from graphprune import models
    from graphprune.cutting import surgery

    model = models.create(spec, weights)
    return gp.trace(model, surgery.example_inputs((("float32", base.input_shape(spec, model, size)),)))


def measure_all(graph: "ModelGraph", profile: "OperatorProfile") -> None:
    """Time, with a progress bar, whatever the tables of this graph will ask for and the cache does not hold."""
    from graphprune.registry import chosen_patterns
    from graphprune.timing.cases import operators

    wanted = operators(graph, chosen_patterns(None, profile.engine), profile.block)
    with Bars() as bars:
        profile.fill(wanted, bars.stage("profile"))


def _about(profile: "OperatorProfile") -> str:
    return (
        f"{profile.engine.identity}\ntimes are kept in {profile.cache}\nvector block {profile.block} channels, "
        f"noise of a time {100 * profile.noise:.1f} %"
    )


def _layer_table(graph: "ModelGraph", times: dict[str, float]) -> Table:
    table = Table("layer", "operator", title="what each dense layer costs", title_justify="left")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    whole = sum(seconds for seconds in times.values() if not math.isnan(seconds))
    for layer in graph.layers:
        seconds = times[layer.node]
        share = f"{100 * seconds / whole:.1f} %"
        table.add_row(layer.module or layer.node, type(layer.operator).__name__.lower(), f"{1e3 * seconds:.4f}", share)
    return table
