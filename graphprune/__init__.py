"""graphprune: prunes trained networks so that they really run faster on the engine they are deployed on.

The names below are the public interface. Each is imported when it is first used: `import graphprune` loads no torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphprune.checkpoint import load, save
    from graphprune.coupling.graph import ModelGraph
    from graphprune.coupling.tracing import trace
    from graphprune.cutting.surgery import apply
    from graphprune.onnx_files.export import export_onnx
    from graphprune.plan import Plan
    from graphprune.result import Result
    from graphprune.searching.search import search
    from graphprune.target import Target
    from graphprune.tasks.task import Task
    from graphprune.timing.measure import measure
    from graphprune.training.finetune import finetune
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
    "ModelGraph": "coupling.graph",
    "Plan": "plan",
    "Result": "result",
    "Target": "target",
    "Task": "tasks.task",
    "apply": "cutting.surgery",
    "export_onnx": "onnx_files.export",
    "finetune": "training.finetune",
    "load": "checkpoint",
    "measure": "timing.measure",
    "save": "checkpoint",
    "search": "searching.search",
    "trace": "coupling.tracing",
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
