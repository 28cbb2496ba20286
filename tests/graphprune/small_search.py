"""What the tests of the search share: one quick search, a cache for all of them, and a count of what is built."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from graphprune.cutting.cuts import Cuts
from graphprune.engines.fake import FakeEngine
from graphprune.onnx_files.export import onnx_bytes
from graphprune.result import Result
from graphprune.searching.evaluation import Workbench
from graphprune.searching.search import search
from graphprune.target import Target
from tests.graphprune.tiny import fitted, task


@pytest.fixture(autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of operator times for all searches of this file."""
    folder = tmp_path_factory.getbasetemp() / "search-cache"
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(folder))


class Builds:
    """Counts the models that are built, and may raise at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuts: list[Cuts] = []
        self.stop_at: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        original: Callable[[Workbench, Cuts], nn.Module] = Workbench.build

        def build(bench: Workbench, cuts: Cuts) -> nn.Module:
            self.cuts.append(cuts)
            if len(self.cuts) == self.stop_at:
                raise self.error
            return original(bench, cuts)

        monkeypatch.setattr(Workbench, "build", build)

    def restart(self, stop_at: int | None = None) -> None:
        """Count from zero."""
        self.cuts, self.stop_at = [], stop_at


@pytest.fixture(name="builds")
def counted_builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


def run(target: Target | None = None, agent: str = "random", trials: int = 6, **options: Any) -> Result:
    """A search on the fake engine."""
    given = {"engine": FakeEngine(), "seed": 5, **options}
    return search(given.pop("model", None) or fitted(), given.pop("task", None) or task(),
                  target or Target(latency=0.7), agent, trials, **given)  # fmt: skip


def real_share(result: Result) -> float:
    """The exact latency share on the fake engine, from fresh exports."""
    engine, x = FakeEngine(), task().example_inputs
    return engine.seconds(onnx_bytes(result.model, x)) / engine.seconds(onnx_bytes(result.dense, x))
