"""The table of agents: lazy, open to other packages, and one way only."""

import ast
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from graphprune import agents
from graphprune.agents import create
from graphprune.errors import InputError

FOLDER = Path(agents.__file__).parent


def imports(module: str) -> set[str]:
    """The modules that a file imports."""
    nodes = list(ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown agent 'autosculp'; known: amc, autosculpt, bo, .*, tpe, uniform"):
        create("autosculp")


def test_another_package_can_add_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "graphprune.agents.uniform:Uniform", "graphprune.agents")
    monkeypatch.setattr(agents, "entry_points", lambda group: [entry] if group == "graphprune.agents" else [])
    assert create("mine").name == "uniform"
    with pytest.raises(InputError, match="mine"):
        create("yours")


@pytest.mark.parametrize("name", ["uniform", "random", "magnitude", "dp"])
def test_baselines_need_no_learning_library(name: str) -> None:
    code = (
        f"import sys; from graphprune.agents import create; create({name!r});"
        "print(sorted({'torch', 'stable_baselines3', 'sb3_contrib', 'torch_geometric'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_autosculpt_never_reaches_the_dynamic_programme() -> None:
    reached, todo = set(), {"graphprune.agents.autosculpt"}
    while todo:
        module = todo.pop()
        reached.add(module)
        found = {
            name for name in imports(module.removeprefix("graphprune.agents.")) if name.startswith("graphprune.agents.")
        }
        todo |= found - reached
    assert "graphprune.agents.encoder" in reached
    assert "graphprune.agents.dp" not in reached


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_agents_know_no_pattern_and_no_engine(path: Path) -> None:
    asked = {f"graphprune.searching.{name}" for name in ("environment", "past", "problem", "storage", "views")}
    allowed = {"graphprune.agents", "graphprune.errors", "graphprune.randomness", "graphprune.record"} | asked
    own = {name for name in imports(path.stem) if name.startswith("graphprune")}
    assert {name for name in own - allowed if not name.startswith("graphprune.agents.")} == set()
