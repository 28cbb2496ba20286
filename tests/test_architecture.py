"""Which package may import which: read from the source, so that no import hides in a function."""

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"graphprune": "graphprune", "patterns": "graphprune.patterns", "agents": "graphprune.agents"}
INFERENCE = {"onnxruntime", "openvino", "tensorrt"}
LAYERS = (
    "files", "models", "engines", "coupling", "cutting", "onnx_files", "repairing", "timing", "tasks", "training",
    "searching", "reporting", "commands",
)  # fmt: skip
"""The folders of `graphprune`, each of which reads those before it alone."""
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) for each import that runs; those for type checkers do not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unread = {id(inner) for node in ast.walk(tree) if _for_types(node) for inner in ast.walk(node)}
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name is from"
            yield str(node.module), id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def arrow(name: str, imported: str, at_top: bool) -> bool:
    """Whether a module may import another: only the registry looks at patterns and agents, and only when asked to."""
    for package in ("graphprune.patterns", "graphprune.agents"):
        if within(imported, package) and not within(name, package):
            return name == "graphprune.registry" and not at_top
    return True


def offenders(allowed: Callable[[str, str, bool], bool]) -> list[str]:
    """The imports that a rule forbids, as "module -> imported"."""
    return [
        f"{name} -> {imported}"
        for name, path in MODULES.items()
        for imported, at_top in imports(path)
        if not allowed(name, imported, at_top)
    ]


def test_arrows_point_one_way():
    assert offenders(arrow) == []


def layer(name: str) -> int | None:
    """The number of the folder in `LAYERS` that a module lies in; None for those that lie in none."""
    return next((number for number, own in enumerate(LAYERS) if within(name, f"graphprune.{own}")), None)


def upwards(name: str, imported: str) -> bool:
    """Whether a module of one folder reads one of a later folder."""
    own, read = layer(name), layer(imported)
    return own is not None and read is not None and read > own


def test_folders_read_only_those_before_them():
    """What is imported when it is needed may lie anywhere: a graph's table is printed by what knows graphs."""
    assert offenders(lambda name, imported, at_top: not (at_top and upwards(name, imported))) == []


def test_every_folder_has_its_layer():
    folders = {path.parent.name for path in (ROOT / "graphprune").glob("*/__init__.py")}
    assert folders - {"patterns", "agents"} == set(LAYERS)


def test_agents_see_neither_torch_modules_nor_onnx():
    forbidden = (
        "graphprune.cutting.surgery",
        "graphprune.coupling.tracing",
        "graphprune.onnx_files.export",
        "graphprune.engines",
        "onnx",
        "timm",
    )

    def allowed(name: str, imported: str, at_top: bool) -> bool:
        agent = within(name, "graphprune.agents")
        return not (agent and any(within(imported, package) for package in forbidden))

    assert offenders(allowed) == []


def test_only_engines_import_an_inference_engine():
    def allowed(name: str, imported: str, at_top: bool) -> bool:
        return within(name, "graphprune.engines") or imported.partition(".")[0] not in INFERENCE

    assert offenders(allowed) == []


def test_nothing_unsafe_and_no_bare_name_is_imported():
    """`patterns` and `agents` are names of other people's packages."""
    assert (
        offenders(lambda name, imported, at_top: imported.partition(".")[0] not in UNSAFE | {"patterns", "agents"})
        == []
    )


def calls() -> Iterator[tuple[str, str, dict[str | None, str]]]:
    """(module, what is called, keyword arguments) for each call in the packages."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield name, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_is_unpickled_or_evaluated():
    for name, called, options in calls():
        assert called not in ("torch.load", "torch.save", "eval", "exec"), f"{name} calls {called}"
        assert called not in ("np.load", "numpy.load") or options.get("allow_pickle") == "False", name


def test_the_rules_see_what_they_forbid(tmp_path: Path):
    """Each kind of import that the tests look for is found where it is."""
    file = tmp_path / "sample.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import pickle\n"
        "import onnxruntime as engine\n"
        "def late():\n    from graphprune.patterns import PATTERNS\n    import graphprune.agents\n"
    )
    found = dict(imports(file))
    assert "pickle" not in found
    assert found["onnxruntime"]
    assert not found["graphprune.patterns"]
    assert not found["graphprune.agents"]
    assert not arrow("graphprune.searching.search", "graphprune.patterns", at_top=False)
    assert not arrow("graphprune.patterns.filter", "graphprune.agents", at_top=False)
    assert not arrow("graphprune.registry", "graphprune.agents", at_top=True)
    assert arrow("graphprune.registry", "graphprune.agents", at_top=False)
    assert upwards("graphprune.coupling.graph", "graphprune.reporting.tables")
    assert not upwards("graphprune.reporting.tables", "graphprune.coupling.graph")


def test_all_modules_are_seen():
    assert {"graphprune.registry", "graphprune.patterns.filter", "graphprune.agents.base"} <= MODULES.keys()
    assert "graphprune.commands.prune" in MODULES
    assert len(MODULES) > 50


def test_only_standard_names_are_forbidden_as_unsafe():
    """A misspelt name would forbid nothing."""
    assert {"pickle", "shelve", "marshal"} <= UNSAFE & sys.stdlib_module_names
