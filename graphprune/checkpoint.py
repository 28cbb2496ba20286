"""Saving a result and loading its model: JSON and safetensors in one folder. Nothing is unpickled or imported."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune import machine, models
from graphprune.cutting import surgery
from graphprune.errors import InputError
from graphprune.files import tensors
from graphprune.files.atomic import staging
from graphprune.plan import Plan
from graphprune.record import Record
from graphprune.result import Result

FORMAT = 1
PLAN, WEIGHTS, RESULT = "plan.json", "model.safetensors", "result.json"


def save(result: Result, folder: str | Path) -> Path:
    """Write `plan.json`, `model.safetensors` and `result.json`: all of them or none, older ones survive a failure.

    Returns the folder. Raises InputError, one line, when the disk does not take them.
    """
    plan = result.plan.to_json().encode()
    weights = tensors.to_bytes(result.model)
    body = _body(result) | {"files": {PLAN: _digest(plan), WEIGHTS: _digest(weights)}}
    with staging(folder) as stage:
        (stage / PLAN).write_bytes(plan)
        (stage / WEIGHTS).write_bytes(weights)
        (stage / RESULT).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The saved model, in eval mode on the CPU, with every tensor bit for bit as it was saved.

    The dense architecture is built from the saved spec, or is `model` (which stays untouched): a model that came from
    Python code must be passed. Raises InputError, one line, for files that are missing, damaged, of another format or
    of different saves, for a `model` that is not the one the plan was made for, and for a spec that would fetch
    weights or import code.
    """
    body = read_result(folder)
    plan = Plan.from_json(_bytes(folder, PLAN).decode("utf-8", errors="replace"))
    saved = tensors.read(Path(folder) / WEIGHTS)
    for name in (PLAN, WEIGHTS):
        if _digest(_bytes(folder, name)) != body["files"][name]:
            raise InputError(f"{Path(folder) / name} was changed, or is of another save than {RESULT}")
    for dtype, _ in plan.inputs:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InputError(f"{Path(folder) / PLAN} has an input of unknown type {dtype!r}")
    with torch.random.fork_rng(devices=[]):
        dense = _dense(body["spec"], model, saved)
        pruned = surgery.apply(dense, plan)
        _make_buffers(pruned, plan, saved)
    tensors.fill(pruned, saved)
    return pruned.eval()


def read_result(folder: str | Path) -> dict[str, Any]:
    """The saved facts: `spec`, `record`, `dense_record`, `searched` (None where no search made the result), `target`,
    `met`, `notes`, `history`, `rivals`, `environment`.

    Records are `Record` values. Raises InputError, one line, for a file that is missing, damaged or of another format.
    """
    path = Path(folder) / RESULT
    try:
        body: dict[str, Any] = json.loads(_bytes(folder, RESULT))
        if body["format"] != FORMAT:
            raise InputError(f"{path} has format {body['format']!r}, this version reads {FORMAT}")
        if not isinstance(body["spec"], str) or not {PLAN, WEIGHTS} <= body["files"].keys():
            raise TypeError("a field has the wrong type")
        for name in ("record", "dense_record"):
            body[name] = Record.from_json(json.dumps(body[name]))
        searched = body.get("searched")
        body["searched"] = None if searched is None else Record.from_json(json.dumps(searched))
        body["rivals"] = {agent: Record.from_json(json.dumps(record)) for agent, record in body["rivals"].items()}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a saved result: {type(error).__name__} {error}") from None
    return body


def _body(result: Result) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "spec": models.architecture(result.spec),
        "record": json.loads(result.record.to_json()),
        "dense_record": json.loads(result.dense_record.to_json()),
        "searched": None if result.searched is None else json.loads(result.searched.to_json()),
        "rivals": {agent: json.loads(record.to_json()) for agent, record in result.rivals.items()},
        "target": {name: bound for name, bound in asdict(result.target).items() if bound is not None},
        "met": result.met,
        "notes": list(result.notes),
        "history": [list(entry) for entry in result.history],
        "environment": machine.environment(),
    }


def _dense(spec: str, model: nn.Module | None, saved: dict[str, Tensor]) -> nn.Module:
    """The dense model to cut, in the saved types. Its values are all replaced later."""
    if model is None and not spec:
        raise InputError("the saved model was built by the caller's own code: pass that model as `model`")
    if model is None:
        models.refuse_remote(spec)
        model = models.create(spec)
    copied = surgery.varied(model).cpu()
    tensors.convert_types(copied, saved)
    return copied


def _make_buffers(pruned: nn.Module, plan: Plan, saved: Mapping[str, Tensor]) -> None:
    """Call the model once where it makes a buffer only then (tables of positions)."""
    if any(name in saved and buffer.shape != saved[name].shape for name, buffer in pruned.named_buffers()):
        with torch.no_grad():
            pruned.eval()(*surgery.example_inputs(plan.inputs))


def _bytes(folder: str | Path, name: str) -> bytes:
    path = Path(folder) / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()
