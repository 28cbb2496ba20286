"""graphprune: prunes trained networks so that they really run faster on the engine they are deployed on.

The names below are the public interface. Each is imported when it is first used: `import graphprune` loads no torch.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.checkpoint import load, save
    from graphprune.export import export_onnx
    from graphprune.finetune import finetune
    from graphprune.graph import ModelGraph
    from graphprune.measure import measure
    from graphprune.plan import Plan
    from graphprune.result import Result
    from graphprune.search import search
    from graphprune.surgery import apply
    from graphprune.target import Target
    from graphprune.task import Task
    from graphprune.tracing import trace
    from graphprune.uniform import uniform_plan

__all__ = [
    "ModelGraph",
    "Plan",
    "Result",
    "Target",
    "Task",
    "__version__",
    "apply",
    "export_onnx",
    "finetune",
    "load",
    "measure",
    "save",
    "search",
    "trace",
    "uniform_plan",
]

__version__ = version("graphprune")

_HOMES = {
    "ModelGraph": "graph",
    "Plan": "plan",
    "Result": "result",
    "Target": "target",
    "Task": "task",
    "apply": "surgery",
    "export_onnx": "export",
    "finetune": "finetune",
    "load": "checkpoint",
    "measure": "measure",
    "save": "checkpoint",
    "search": "search",
    "trace": "tracing",
    "uniform_plan": "uniform",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
    value = getattr(import_module(f"graphprune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Python binds a submodule to its package once it is imported; here the functions of the same name win."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
