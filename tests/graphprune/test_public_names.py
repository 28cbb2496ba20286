"""The public names: few, lazy, and never hidden by a module of the same name."""

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import graphprune as gp

SOURCE = Path(gp.__file__).read_text(encoding="utf-8")


def in_new_process(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return finished.stdout.strip()


def test_importing_graphprune_is_fast_and_loads_nothing_heavy():
    # A process that only starts up is the base line: on a busy machine both are slower.
    code = "import sys, time; a = time.process_time(); import graphprune; print(time.process_time() - a, *sys.modules)"
    seconds, *modules = in_new_process(code).split()
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "timm", "typer", "optuna", "matplotlib", "stable_baselines3"}
    assert not heavy & set(modules)
    assert float(seconds) < 0.2


def test_at_most_sixteen_names_and_each_can_be_used():
    assert len(gp.__all__) <= 16
    assert sorted(gp.__all__) == gp.__all__
    for name in gp.__all__:
        assert getattr(gp, name) is not None
        assert name in dir(gp)


def test_names_are_those_of_their_modules():
    from graphprune import checkpoint
    from graphprune.coupling import tracing
    from graphprune.cutting import surgery

    assert gp.trace is tracing.trace
    assert gp.apply is surgery.apply
    assert gp.save is checkpoint.save
    assert gp.load is checkpoint.load


def test_no_module_has_the_name_of_a_function():
    """Python binds a module to its package as it is imported, in the place of what had the name."""
    assert not {module.name for module in pkgutil.iter_modules(gp.__path__)} & set(gp.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        _ = gp.prune_everything


def test_type_checkers_see_the_same_names_from_the_same_modules():
    """The `if TYPE_CHECKING` imports and the run-time table are two lists of one fact: they must agree."""
    checked = {}
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                checked |= {alias.name: line.module for alias in line.names}
    assert checked == {name: f"graphprune.{home}" for name, home in gp._HOMES.items()}
    assert sorted([*checked, "__version__"]) == gp.__all__


def test_every_module_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(gp.__path__, "graphprune.")]
    assert len(names) > 40
    for name in names:
        import_module(name)
    for name in ("search", "measure", "finetune"):
        assert callable(getattr(gp, name))


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert gp.__version__ == version("graphprune")
