"""Searches: brings every method to the same measured latency. Runs on the machine whose latency counts."""

import argparse
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import zoo
from equal_latency import Dense, Finder, with_new_norms
from headline_rows import FACTS, WEIGHTS, Facts, Row, folder_of, store, write_facts
from torch import nn

import graphprune as gp
from graphprune.counting import count
from graphprune.coupling.tracing import trace
from graphprune.cutting.surgery import remember
from graphprune.errors import InputError, StepError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.record import Share
from graphprune.tasks.task import Task

OURS = ("dp", "autosculpt")
KEPT = tuple(np.linspace(0.1, 0.95, 8))
"""Shares that Torch-Pruning keeps, tried before bisecting."""
CHOOSING = 8
"""Batches of validation images that rank Torch-Pruning's settings."""
FINALISTS = 6
"""Settings of Torch-Pruning that go into the short fine-tuning which picks one."""


def say(*words: object) -> None:
    """A line with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def load_dense(name: str, options: argparse.Namespace) -> Dense:
    """The trained network, traced, and its task."""
    module = zoo.build(name, zoo.weights_of(name, options.weights)).eval()
    task = Task.load(f"cifar10:{options.data}", validation=options.validation)
    graph = remember(module, trace(module, task.example_inputs))
    return Dense(name, module, graph, task, onnx_bytes(module, task.example_inputs))


@dataclass(frozen=True)
class Planner:
    """Plans the rows of one network."""

    dense: Dense
    options: argparse.Namespace

    def run(self) -> None:
        """Every row that is not there yet. The dense network is always one: it teaches."""
        wanted = self.options.methods
        self.keep_whole("dense", self.dense.name)
        for sibling in zoo.NETWORKS[self.dense.name].siblings if "sibling" in wanted else ():
            if zoo.trained_weights(sibling, self.options.weights):
                self.keep_whole("sibling", sibling)
            else:
                say(self.dense.name, f"no row for the sibling {sibling}: it is not trained")
        for speedup in self.options.speedups:
            for method in [method for method in OURS if method in wanted]:
                self.search(method, speedup)
        if "torch-pruning" in wanted:
            self.prune_with_rival()

    def facts(self, method: str, speedup: float | None, **more: Any) -> Facts:
        """What all rows say of themselves."""
        own = {"model": self.dense.name, "method": method, "speedup": speedup, "network": self.dense.name}
        return own | {"variant": ""} | more

    def judged(self, model: nn.Module, share: Share, validation: float | None = None) -> Facts:
        """What is known of a network before it is tuned."""
        counts = count(model, self.dense.task.example_inputs)
        if validation is None:
            part = replace(self.dense.task, validation=self.dense.task.validation[:CHOOSING])
            validation = part.accuracy(model)
        return {"share": asdict(share), "validation": validation} | asdict(counts)

    def keep_whole(self, method: str, network: str) -> None:
        """A row at its own latency: the dense network or a smaller one, as it was trained."""
        name = method if method == "dense" else f"{method}-{network}"
        folder = folder_of(self.options.work, self.dense.name, name, None)
        if (folder / WEIGHTS).exists():
            return
        model = zoo.build(network, zoo.weights_of(network, self.options.weights)).eval()
        facts = self.facts(method, None, network=network, variant=network)
        store(folder, model, facts | self.judged(model, self.dense.share(model, fresh=True)))
        say(self.dense.name, name)

    def search(self, method: str, speedup: float) -> None:
        """graphprune's row, and the same plan without compensation (batch norms re-estimated, as for the others)."""
        folders = [
            folder_of(self.options.work, self.dense.name, name, speedup) for name in (method, f"{method}-uncompensated")
        ]
        if (folders[0] / FACTS).exists():
            return
        try:
            result = gp.search(
                self.dense.module, self.dense.task, gp.Target(latency=1 / speedup), method, self.options.trials,
                study=self.options.work / f"{self.dense.name}.db", progress=_progress,
            )  # fmt: skip
        except (InputError, StepError) as error:
            write_facts(folders[0], self.facts(method, speedup, error=str(error)))
            return
        share, model = cast(Share, result.record.measured), cast(nn.Module, result.model)
        sliced = gp.apply(self.dense.module, result.plan, self.dense.graph)
        plain = with_new_norms(sliced, self.dense.task.calibration)
        for folder, name, kept in zip(folders, (method, f"{method}-uncompensated"), (model, plain), strict=True):
            if name != method and method != OURS[0]:
                continue  # one row without is enough
            gp.save(replace(result, model=kept), folder)
            facts = self.judged(kept, share) | {"met": result.met, "notes": result.notes}
            write_facts(folder, self.facts(name, speedup, trials=len(result.records), **facts))
            say(self.dense.name, name, f"{speedup:g}x: {facts['validation']:.2%} at {share.value:.3f}")

    def prune_with_rival(self) -> None:
        """Torch-Pruning's rows: each setting bisected on its ratio to each latency; finalists keep their weights."""
        from torch_pruning_adapter import Setting, TorchPruning, all_settings

        def missing(setting: Setting) -> list[float]:
            places = {s: self._rival_folder(setting.name, s) for s in self.options.speedups}
            return [speedup for speedup, folder in places.items() if not (folder / FACTS).exists()]

        rival: TorchPruning | None = None
        for setting in all_settings(self.dense.module):
            left = missing(setting) if re.search(self.options.variant, setting.name) else []
            if not left:
                continue
            rival = rival or TorchPruning.of(self.dense.module, self.dense.task)
            finder = Finder(_builder(rival, setting), self.dense.share, _shape, KEPT)
            for speedup in left:
                self._keep_rival(setting.name, speedup, finder)
        for speedup in self.options.speedups:
            keep_finalists(Row(self._rival_folder("", speedup)))

    def _rival_folder(self, name: str, speedup: float) -> Any:
        candidate = name.removeprefix("torch-pruning ").replace(" ", "-")
        return folder_of(self.options.work, self.dense.name, "torch-pruning", speedup, candidate)

    def _keep_rival(self, name: str, speedup: float, finder: "Finder[nn.Module]") -> None:
        facts = self.facts("torch-pruning", speedup, variant=name.removeprefix("torch-pruning "))
        found, reason = None, ""
        try:
            found = finder.find(1 / speedup)
        except StepError as error:
            reason = str(error)
        if found is None:
            reason = reason or f"out of reach: the fastest network is at {finder.fastest:.3f}"
            write_facts(self._rival_folder(name, speedup), facts | {"error": reason})
            say(self.dense.name, name, f"{speedup:g}x: {reason}")
            return
        model = with_new_norms(found[0], self.dense.task.calibration)
        store(self._rival_folder(name, speedup), model, facts | self.judged(model, found[1]))
        say(self.dense.name, name, f"{speedup:g}x at {found[1].value:.3f}")


def _builder(rival: Any, setting: Any) -> Any:
    def build(kept: float) -> nn.Module | None:
        try:
            model: nn.Module = rival.prune(setting, 1 - kept)
            model(rival.example)
        except Exception as error:  # whatever the rival does wrong at a ratio, there may be others
            print(f"{setting.name} cannot keep {kept:.3f}: {str(error).splitlines()[:1]}", file=sys.stderr)
            return None
        return model

    return build


def _shape(model: nn.Module) -> object:
    return tuple(parameter.shape for parameter in model.parameters())


def keep_finalists(row: Row) -> None:
    """Only the best before tuning keep their weights, so that little has to travel."""
    for candidate in row.usable[FINALISTS:]:
        (candidate.folder / WEIGHTS).unlink()


def _progress(stage: str, done: int, total: int, note: str) -> None:
    if done == total or stage == "search":
        say(stage, f"{done}/{total}", note)


def plan(options: argparse.Namespace) -> None:
    """The rows of every network."""
    for name in options.models:
        Planner(load_dense(name, options), options).run()
