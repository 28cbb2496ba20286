"""The demo's steps on a model small enough for a test, with computed timings."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from graphprune import cli
from graphprune.commands import base
from graphprune.commands import digits_demo as demo
from graphprune.commands.console import Bars
from graphprune.commands.digits_demo import Settings, Shown
from graphprune.engines import fake
from graphprune.engines.fake import FakeEngine
from graphprune.tasks.task import Task

TINY = "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=3&num_classes=10"
SETTINGS = Settings(trials=2, latency=0.8, dense_epochs=1, epochs=1)


class Stages(Bars):
    """Progress that is only listed."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.stages: list[str] = []

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        if self.stages[-1:] != [stage]:
            self.stages.append(stage)


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tiny model and a fake engine in the place of the demo's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SPEC", TINY)
        patch.setattr(fake, "SECONDS_PER_NODE", 1e-9)
        patch.setattr(base, "engine", lambda name, **settings: FakeEngine())
        patch.setenv("GRAPHPRUNE_CACHE", str(tmp_path_factory.mktemp("timings")))
        yield


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shown, list[str], list[str]]:
    """A finished demo: its folder, what it shows, its stages, and how often the test set was read."""
    reads: list[str] = []
    judge = Task.test_accuracy

    def counted(self: Task, model: object) -> float:
        reads.append(type(model).__name__)
        return judge(self, model)  # type: ignore[arg-type]

    folder = tmp_path_factory.mktemp("demo")
    bars = Stages()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "test_accuracy", counted)
        return folder, demo.run(folder, SETTINGS, FakeEngine(), bars), bars.stages, reads


def test_the_test_set_is_read_once_for_each_row(shown):
    _, finished, _, reads = shown
    assert len(reads) == 2
    assert finished.scores.keys() == {"validation accuracy", "test accuracy"}


def test_the_whole_job_is_done_in_order(shown):
    stages = list(dict.fromkeys(shown[2]))
    assert [stage for stage in stages if stage not in ("calibrate", "profile")] == [
        "train", "trace", "search", "verify", "finetune", "export", "measure",
    ]  # fmt: skip


def test_uniform_random_and_dp_got_the_same_target(shown):
    _, finished, _, _ = shown
    result = finished.delivery.result
    assert result.rivals.keys() == {"uniform", "random", "dp"}
    assert finished.found.agent == "autosculpt"
    for record in (finished.found, *result.rivals.values()):
        assert record.feasible
        assert record.measured is not None
        assert record.measured.value <= SETTINGS.latency


def test_the_table_before_fine_tuning_is_not_that_after_it(shown):
    """The rivals are not fine-tuned, so the agent's own row beside them must be its record of the search."""
    result = shown[1].delivery.result
    assert shown[1].found.accuracy in [record.accuracy for record in result.records]
    assert len(result.history) == SETTINGS.epochs
    assert result.record.accuracy == result.history[-1][2]


def test_a_second_run_goes_on_from_the_first(shown):
    """Nothing is trained again: the dense model comes from its checkpoint, the trials from the study."""
    folder, finished, _, _ = shown
    losses: list[float] = []
    task = Task.load("digits", batch_size=64)
    again = demo.dense_model(
        task, SETTINGS, folder / "dense.checkpoint", lambda epoch, loss, accuracy: losses.append(loss)
    )
    assert losses == []
    assert task.accuracy(again) == finished.scores["validation accuracy"][0]


def test_the_command_prints_both_tables(shown):
    """In the same folder, so that little is left to do."""
    arguments = ["demo", "--out", str(shown[0]), "--trials", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "Settings", lambda trials, seed: SETTINGS)
        told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 0, told.stderr
    for text in ("test accuracy", "latency, batch 1", "FLOPs", "parameters", "uniform", "random", "dp", "report.html"):
        assert text in told.stdout
    facts = json.loads((shown[0] / "result.json").read_text())
    assert facts["spec"] == TINY
