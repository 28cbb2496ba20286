"""Measures a delivered model on other engines, with other threads, at other batches.

What was measured is kept in the run's folder, so that its report can be written again without measuring.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from graphprune import checkpoint
from graphprune.delivery import timed
from graphprune.engines.base import Engine, Timing
from graphprune.errors import InputError, StepError
from graphprune.files.atomic import write_text
from graphprune.files.layout import DENSE_ONNX, ENGINES, PRUNED_ONNX
from graphprune.record import Share
from graphprune.registry import chosen_patterns
from graphprune.reporting import grid
from graphprune.reporting.conditions import Condition
from graphprune.reporting.grid import Cell
from graphprune.result import Result
from graphprune.timing.measure import share
from graphprune.timing.profile import Profile

Progress = Callable[[str, int, int, str], None]


def known(result: Result, folder: Path) -> list[Condition]:
    """The condition that the run itself was measured under, if it was, and those that were compared with it later.

    `folder` is the one that `result` was restored from. Raises InputError where what it keeps cannot be read.
    """
    found = {condition.share.engine: condition for condition in _kept(folder)}
    own = result.record.measured
    if own is not None:
        found = {own.engine: replace(found.get(own.engine, Condition(own)), share=own)} | {
            engine: condition for engine, condition in found.items() if engine != own.engine
        }
    return list(found.values())


def compare(
    result: Result, folder: Path, engines: Sequence[Engine], gains: bool, progress: Progress
) -> list[Condition]:
    """What is known, with what is asked for: measured now where need be, and kept in the folder.

    With `gains`, the layers of the dense model are timed on these engines under every pattern too. Raises InputError
    where the folder has no ONNX files or cannot be written, StepError where an engine cannot run the pruned one.
    """
    found = {condition.share.engine: condition for condition in known(result, folder)}
    for number, engine in enumerate(engines):
        progress("measure", number, len(engines), engine.identity)
        condition = found.get(engine.identity) or Condition(_measured(folder, engine))
        if gains and condition.cells is None:
            condition = replace(condition, cells=_cells(result, engine, progress))
        found[engine.identity] = condition
        _keep(folder, found.values())
    progress("measure", len(engines), len(engines), "")
    return list(found.values())


def _measured(folder: Path, engine: Engine) -> Share:
    measurement = timed([folder / DENSE_ONNX, folder / PRUNED_ONNX], engine)
    found = measurement.shares[-1]
    if found is None:
        raise StepError(f"{measurement.engine} cannot run the pruned model: {measurement.timings[-1].error}")
    return found


def _cells(result: Result, engine: Engine, progress: Progress) -> tuple[Cell, ...]:
    def count(done: int, total: int) -> None:
        progress("profile", done, total, engine.identity)

    return tuple(grid.cells({"": result.graph}, Profile(engine), chosen_patterns(None, engine), count))


def _kept(folder: Path) -> list[Condition]:
    """What the folder keeps of the model that is in it now."""
    path = folder / ENGINES
    if not path.exists():
        return []
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return list(map(_read, body["conditions"])) if body["files"] == _files(folder) else []
    except (ValueError, KeyError, TypeError, StepError) as error:
        raise InputError(f"{path} does not hold measurements: {type(error).__name__} {error}") from None


def _read(body: dict[str, object]) -> Condition:
    dense, pruned, engine, cells = (body[name] for name in ("dense", "pruned", "engine", "cells"))
    told = share(Timing(tuple(dense)), Timing(tuple(pruned)), str(engine))  # type: ignore[arg-type]
    return Condition(told, None if cells is None else tuple(map(Cell.from_dict, cells)))  # type: ignore[call-overload]


def _keep(folder: Path, conditions: Iterable[Condition]) -> None:
    told = [
        {
            "engine": condition.share.engine,
            "dense": condition.share.dense,
            "pruned": condition.share.candidate,
            "cells": None if condition.cells is None else [cell.to_dict() for cell in condition.cells],
        }
        for condition in conditions
    ]
    write_text(folder / ENGINES, json.dumps({"files": _files(folder), "conditions": told}, indent=1) + "\n")


def _files(folder: Path) -> object:
    """Digests of plan and weights, which tell the model that was measured from a later one."""
    return checkpoint.read_result(folder)["files"]
