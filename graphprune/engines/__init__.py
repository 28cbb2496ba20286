"""The engines: each module here wraps one inference engine behind `graphprune.engines.base.Engine`."""

import re
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any

from graphprune.engines.base import Engine
from graphprune.errors import InputError

ENGINES = {
    "onnxruntime": "graphprune.engines.onnxruntime:OnnxRuntimeEngine",
    "openvino": "graphprune.engines.openvino:OpenVinoEngine",
}
"""Engines that measure for real, by name; each is imported when it is asked for."""


def create(name: str, **settings: Any) -> Engine:
    """An engine by name. Raises InputError for an unknown one, one that is not installed, or settings it lacks."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; known are {', '.join(sorted(ENGINES))}")
    module, _, kind = ENGINES[name].partition(":")
    try:
        made = getattr(import_module(module), kind)
    except ModuleNotFoundError as error:
        raise InputError(f"the engine {name!r} is not installed ({error}): pip install graphprune[{name}]") from None
    if unknown := settings.keys() - {field.name for field in fields(made)}:
        raise InputError(f"the engine {name!r} has no setting {', '.join(sorted(unknown))}")
    engine: Engine = made(**settings)
    return engine


def settings_in(identity: str) -> dict[str, Any]:
    """The `name`, `threads` and `batch` that an identity tells; ONNX Runtime for an engine that is not known here."""
    name = identity.partition(" ")[0]
    threads, batch = re.search(r"(\d+) threads", identity), re.search(r"batch (\d+)$", identity)
    return {
        "name": name if name in ENGINES else "onnxruntime",
        "threads": int(threads[1]) if threads else 1,
        "batch": int(batch[1]) if batch else 1,
    }


def settings_of(engine: Engine) -> dict[str, Any] | None:
    """What `create` needs to make the same engine in another process; None for one that only exists in this one."""
    name = getattr(engine, "name", None)
    return {"name": name, **asdict(engine)} if name in ENGINES else None  # type: ignore[call-overload]
