"""What several benchmarks share: the four models, their graphs at a batch size, what a step takes, and the names of
result files.
"""

import argparse
import ctypes
import fcntl
import gc
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import zoo
from torch import nn

import graphprune as gp
from graphprune import models
from graphprune.coupling.graph import ModelGraph
from graphprune.cutting.cuts import Cuts
from graphprune.engines import ENGINES
from graphprune.engines.base import Engine
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import StepError
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.randomness import seeded
from graphprune.record import Record, Share
from graphprune.registry import chosen_patterns
from graphprune.searching.candidates import Candidates
from graphprune.searching.evaluation import Workbench
from graphprune.searching.problem import Choices, GraphView, Problem
from graphprune.searching.search import Session, latency_cost

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "resnet20": "cifar:resnet20",
    "resnet50": "timm:resnet50",
    "mobilenetv2_100": "timm:mobilenetv2_100",
    "vit_tiny": "timm:vit_tiny_patch16_224",
}
"""Name -> spec; random weights, native input size."""
COLOURS = {"resnet20": "#0072b2", "resnet50": "#d55e00", "mobilenetv2_100": "#009e73", "vit_tiny": "#cc79a7"}


@dataclass(frozen=True)
class Subject:
    """A model with seeded random weights, its graph, and example inputs."""

    name: str
    module: nn.Module
    graph: ModelGraph
    example: torch.Tensor


def subject(name: str, seed: int = 0) -> Subject:
    """Create and trace one of the models."""
    with seeded(seed):
        module = models.create(MODELS[name]).eval()
        example = torch.randn(2, *models.default_input_size(MODELS[name], module))
    return Subject(name, module, gp.trace(module, example), example)


def timed(
    bench: Workbench, cuts: Cuts, dense: bytes, example: torch.Tensor, engine: Engine, rounds: int
) -> Share | None:
    """A cut model's share of the dense one's latency, cut out of its file as in a search; None if it does not run."""
    pruned = bench.cut(cuts).eval()
    file = bench.file(pruned, cuts) or onnx_bytes(pruned, example)
    return gp.measure([dense, file], rounds=rounds, engine=engine).shares[-1]


def raw(measured: Share) -> dict[str, list[float]]:
    """The samples behind a share, in seconds, to the nanosecond: no clock tells more."""
    return {
        "dense_seconds": [round(sample, 9) for sample in measured.dense],
        "seconds": [round(sample, 9) for sample in measured.candidate],
    }


def case(line: Mapping[str, Any]) -> tuple[str, str]:
    """Model and tables of a search of `convergence.py`: what searches must have in common to compare."""
    return line["model"], line.get("tables", "earlier")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean of some shares and their range, in per cent; NaN stands for a search that met no target."""
    if np.isnan(values).any():
        return "none within target"
    low, high = 100 * min(values), 100 * max(values)
    return f"{mean(values):.{digits}%} ({low:.{digits}f} to {high:.{digits}f})"


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether a file is ours until the context ends: no other process has it. A killed one gives it back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def prepared(
    name: str, options: argparse.Namespace, latency: float, study: Path | None = None, engine: Engine | None = None,
    batch_size: int = 128,
) -> Session:  # fmt: skip
    """What all searches of a trained network of `zoo.py` share on CIFAR-10, at a share of its latency: tables,
    correction, reference, study; of a script's `weights`, `data` and (validation) `images`. Without an engine it is
    ONNX Runtime.
    """
    task = gp.Task.load(f"cifar10:{options.data}", batch_size=batch_size, validation=options.images)
    dense = zoo.build(name, zoo.weights_of(name, [options.weights, zoo.TRAINED]))
    engine, target = engine or OnnxRuntimeEngine(), gp.Target(latency=latency)
    return Session.prepare(dense, task, target, engine, chosen_patterns(None, engine), study, lambda *_: None)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that these benchmarks have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default=",".join(MODELS), help="some of: " + ", ".join(MODELS))
    made.add_argument("--engine", default="onnxruntime", choices=list(ENGINES))
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--batch", type=int, default=1)
    return made


def trained_parser(description: str | None, models: str) -> argparse.ArgumentParser:
    """The options of those that are about trained networks on CIFAR-10."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder with CIFAR-10")
    made.add_argument("--weights", required=True, type=Path, help="folder with cifar10_<model>.safetensors")
    made.add_argument("--models", default=models)
    return made


def chosen(names: str) -> list[str]:
    """The models of `--models`."""
    unknown = set(names.split(",")) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown models: {', '.join(sorted(unknown))}; known are {', '.join(MODELS)}")
    return names.split(",")


def result_stem(name: str, threads: int, batch: int, engine: str = "onnxruntime") -> Path:
    """Where a result goes, without the file's ending: named by engine, threads, batch and processor."""
    facts = environment()
    processor = re.sub(r"[^A-Za-z0-9.]+", "-", facts["processor"]).strip("-")
    batches = f"-batch{batch}" * (batch != 1)
    return RESULTS / f"{name}-{engine}{facts[engine]}-{threads}t{batches}-{processor}"


def result_file(table: str, folder: Path = RESULTS) -> Path:
    """Where a table of one thread and batch 1 goes."""
    return folder / f"{result_stem(table, 1, 1).name}.json"


@dataclass(frozen=True)
class Spent:
    """What an action took: seconds of processor time, seconds on the wall, and the most bytes that its process held in
    memory meanwhile.
    """

    seconds: float
    wall: float
    peak: int


def spent(action: Callable[[], Any]) -> tuple[Spent, Any]:
    """What an action takes, and what it returns. Linux (with glibc) only, for the sake of the memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is given back, so that it does not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    processor, wall = time.process_time(), time.perf_counter()
    result = action()
    return Spent(time.process_time() - processor, time.perf_counter() - wall, memory("VmHWM")), result


def memory(field: str = "VmRSS") -> int:
    """Bytes of this process in memory: now, or with "VmHWM" the most so far."""
    (line,) = re.findall(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(line)


def in_own_process(function: Callable[..., Any], *arguments: Any, threads: int = 1) -> Any:
    """What a function of a script returns in a fresh process, whose libraries use so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    os.environ |= dict.fromkeys(names, str(threads))  # what this process has loaded does not look again
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def judged_by_tables(candidates: Candidates, limit: float) -> Problem:
    """The problem of some candidates at a predicted latency share, for scripts that judge plans themselves."""
    error, graph = candidates.error(), candidates.graph
    nodes = {node.name: number for number, node in enumerate(graph.nodes)}
    view = GraphView(np.zeros((0, 0), np.float32), np.zeros((2, 0), np.int64), np.zeros(0, np.int64))
    return Problem(
        candidates.decisions(error, nodes), view, {"latency": latency_cost(candidates)}, {"latency": limit}, error,
        _no_evaluator, 0, graph.signature, graph.inputs,
    )  # fmt: skip


def _no_evaluator(choices: Choices) -> Record:
    raise StepError("plans are judged by the script")
