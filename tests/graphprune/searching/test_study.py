"""The study store: what goes in comes out, whole, over processes and kills."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from graphprune.errors import InputError, StepError
from graphprune.plan import Choice, Plan
from graphprune.record import Record, Share
from graphprune.searching.study import Study, label, list_studies

OPTIONS = {"conv1/channels": ["filter 1/2", "filter 1/4"], "conv1/kernel": ["kernel left", "kernel top"]}


def plan(number: int, level: str = "1/2") -> Plan:
    return Plan("model", (Choice("conv1/channels", "filter", level, (number,)),), (("float32", (3, 8, 8)),))


def record(number: int, accuracy: float = 0.5, latency: float = 0.7, feasible: bool = True) -> Record:
    share = Share(latency, latency - 0.01, latency + 0.01, (0.1, 0.2), (0.07, 0.14), "engine")
    return Record(plan(number), accuracy, feasible, {"latency": 0.9}, share, 10, 20, None, "dp", 3, 0.5, {"torch": "2"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "study.db"


def test_records_come_back_whole_and_in_order(path: Path) -> None:
    study = Study.open(path, "task", OPTIONS)
    failure = Record(plan(9), error="the engine ran out of memory\nin line 2", agent="random")
    stored = [record(2), failure, record(1), record(0, accuracy=0.25)]
    for one in stored:
        study.add(one)
    assert study.records() == stored
    assert study.records() == stored  # read before: nothing comes twice
    assert Study.open(path, "task").records() == stored
    assert Study.open(path, "another").records() == []


@pytest.mark.parametrize("storage", ["file", None])
def test_find_serves_identical_plans_only(storage: str | None, path: Path) -> None:
    study = Study.open(path if storage else None, "task")
    study.add(record(1))
    study.add(record(1, accuracy=0.9))
    assert study.find(plan(1)) == record(1)  # the first one: repeats are never evaluated, so never stored
    assert study.find(plan(2)) is None
    assert study.find(plan(1, "1/4")) is None


def test_find_sees_what_another_process_stored(path: Path) -> None:
    ours, theirs = Study.open(path, "task"), Study.open(path, "task")
    assert ours.find(plan(1)) is None
    theirs.add(record(1))
    assert ours.find(plan(1)) == record(1)


def test_optuna_sees_parameters_values_and_failures(path: Path) -> None:
    study = Study.open(path, "task", OPTIONS)
    study.add(record(1, accuracy=0.5, latency=0.7))
    study.add(Record(plan(2), error="boom"))
    study.add(Record(plan(3, "7/8"), 0.5, predicted={"latency": 0.25}))
    plain = optuna.load_study(study_name="task", storage=f"sqlite:///{path}")
    good, failed, odd = plain.trials
    assert plain.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    assert plain.metric_names == ["accuracy", "latency share"]
    assert good.params == {"conv1/channels": "filter 1/2", "conv1/kernel": "dense"}
    assert good.distributions["conv1/kernel"].choices == ("dense", "kernel left", "kernel top")
    assert good.values == [0.5, 0.7]
    assert good.user_attrs["agent"] == "dp"
    assert failed.state == optuna.trial.TrialState.FAIL
    assert failed.user_attrs["error"] == "boom"
    assert odd.params == {"conv1/kernel": "dense"}  # "filter 7/8" is no choice of that column
    assert odd.values == [0.5, 0.25]


def test_options_are_those_the_study_was_made_with(path: Path) -> None:
    Study.open(path, "task", OPTIONS).add(record(1))
    other = Study.open(path, "task", {"conv1/channels": ["filter 1/8"], "conv2/channels": ["filter 1/2"]})
    other.add(record(2))
    trials = optuna.load_study(study_name="task", storage=f"sqlite:///{path}").trials
    assert [trial.params for trial in trials] == [{"conv1/channels": "filter 1/2", "conv1/kernel": "dense"}] * 2


@pytest.mark.parametrize("accuracy", [None, float("nan"), float("inf")])
def test_a_record_without_a_usable_accuracy_is_a_failure(accuracy: float | None) -> None:
    study = Study.open(None, "task")
    study.add(Record(plan(1), accuracy, feasible=True))
    assert study.summary().failures == 1
    assert study.summary().accuracy is None


def test_a_large_record_is_stored_whole(path: Path) -> None:
    large = Record(Plan("model", (Choice("fc/hidden", "hidden", "1/2", tuple(range(100_000))),)), 0.5)
    Study.open(path, "task").add(large)
    assert Study.open(path, "task").find(large.plan) == large


def test_summaries(path: Path) -> None:
    first = Study.open(path, "b")
    for one in (
        record(1, 0.9, 0.8, feasible=False),
        record(2, 0.6, 0.5),
        record(3, 0.7, 0.4),
        Record(plan(4), error="x"),
    ):
        first.add(one)
    Study.open(path, "a")
    optuna.create_study(storage=f"sqlite:///{path}", study_name="foreign")
    empty, full = list_studies(path)
    assert (empty.name, empty.trials, empty.failures, empty.accuracy, empty.latency, empty.date) == (
        "a", 0, 0, None, None, None,
    )  # fmt: skip
    assert (full.name, full.trials, full.failures, full.accuracy, full.latency) == ("b", 4, 1, 0.7, 0.4)
    assert full.date is not None
    assert abs(time.time() - full.date.timestamp()) < 60


def test_labels() -> None:
    assert label("filter", "1/2") == "filter 1/2"
    assert label("branch", "") == "branch"


def _not_a_database(path: Path) -> None:
    path.write_text("these are not the bytes of a database, although there are some\n" * 20)


def _foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table bookmarks (url text)")
    database.close()


def _damaged_store(path: Path) -> None:
    Study.open(path, "task").add(record(1))
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("spoil", [_not_a_database, _foreign_database, _damaged_store])
def test_a_file_that_is_no_store_is_refused_in_one_line_and_left_alone(spoil: object, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    spoil(path)  # type: ignore[operator]
    before = path.read_bytes()
    for attempt in (lambda: Study.open(path, "task").records(), lambda: list_studies(path)):
        with pytest.raises(InputError) as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == before


def test_listing_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no study store"):
        list_studies(tmp_path / "study.db")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("storage", ["nonsense://host/base", "sqlite:////proc/none/study.db"])
def test_a_storage_that_cannot_be_opened(storage: str) -> None:
    with pytest.raises(InputError, match="cannot open the study store") as caught:
        Study.open(storage, "task")
    assert len(str(caught.value).splitlines()) == 1


def test_passwords_are_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        Study.open("nonsense://user:secret@host/base", "task")
    assert "secret" not in str(caught.value)


def test_a_study_of_another_program_is_not_written_to(path: Path) -> None:
    Study.open(path, "ours")
    foreign = optuna.create_study(storage=f"sqlite:///{path}", study_name="task", directions=["maximize", "minimize"])
    foreign.add_trial(optuna.trial.create_trial(values=[1.0, 1.0]))
    with pytest.raises(InputError, match="not made by graphprune"):
        Study.open(path, "task")
    assert "graphprune" not in foreign.user_attrs


def test_a_damaged_record_is_refused(path: Path) -> None:
    Study.open(path, "task").add(record(1))
    with sqlite3.connect(path) as database:
        database.execute("update trial_user_attributes set value_json = '\"{}\"' where key = 'record'")
    database.close()
    with pytest.raises(InputError, match="trial 0 of the study holds no record"):
        Study.open(path, "task").records()


def test_a_full_disk_is_one_line_and_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.open(path, "task")
    study.add(record(1))
    monkeypatch.setattr("optuna.storages._rdb.storage.time.sleep", lambda seconds: None)
    with sqlite3.connect(path) as database:
        pages = database.execute("pragma page_count").fetchone()[0]
    database.close()
    connect = sqlite3.connect

    def full(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)  # type: ignore[call-overload]
        connection.execute(f"pragma max_page_count = {pages + 2}")
        return connection  # type: ignore[no-any-return]

    monkeypatch.setattr(sqlite3.dbapi2, "connect", full)
    large = Record(Plan("model", (Choice("fc/hidden", "hidden", "1/2", tuple(range(50_000))),)), 0.5)
    with pytest.raises(StepError, match=r"cannot store a trial: .*full"):
        study.add(large)
    monkeypatch.undo()
    assert Study.open(path, "task").records() == [record(1)]


WORKER = """
import sys, time
from graphprune.plan import Choice, Plan
from graphprune.record import Record
from graphprune.searching.study import Study
path, first, last, pause = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
study = Study.open(path, "task", {"conv1/channels": ["filter 1/2"]})
for number in range(first, last):
    plan = Plan("model", (Choice("conv1/channels", "filter", "1/2", (number,)),))
    if study.find(plan) is None:
        time.sleep(pause)
        study.add(Record(plan, accuracy=number / 100))
        print(number, flush=True)
print("end", flush=True)
"""


def _worker(path: Path, first: int, last: int, pause: float = 0.0) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WORKER, str(path), str(first), str(last), str(pause)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def _numbers(path: Path) -> list[int]:
    return [one.plan.choices[0].keep[0] for one in Study.open(path, "task").records()]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_run_resumes_and_loses_at_most_the_trial_in_flight(path: Path) -> None:
    worker = _worker(path, 0, 12, pause=0.02)
    assert worker.stdout is not None
    for _ in range(5):
        worker.stdout.readline()
    worker.send_signal(signal.SIGKILL)
    reported = 5 + sum(1 for _ in worker.stdout)
    worker.stdout.close()
    assert worker.wait() == -signal.SIGKILL
    stored = _numbers(path)
    assert stored == list(range(len(stored)))
    assert reported <= len(stored) <= reported + 1 < 12
    resumed, _ = _worker(path, 0, 12).communicate(timeout=60)
    assert resumed.split() == [*map(str, range(len(stored), 12)), "end"]  # only the missing ones were evaluated
    assert _numbers(path) == list(range(12))


def test_two_processes_write_at_the_same_time(path: Path) -> None:
    workers = [_worker(path, 0, 15), _worker(path, 100, 115)]
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert output.endswith("end\n")
    numbers = _numbers(path)
    assert [number for number in numbers if number < 100] == list(range(15))
    assert [number for number in numbers if number >= 100] == list(range(100, 115))
    trials = optuna.load_study(study_name="task", storage=f"sqlite:///{path}").trials
    assert [trial.number for trial in trials] == list(range(30))


def test_nothing_is_printed_and_settings_stay(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = optuna.logging.get_verbosity()
    Study.open(path, "task").add(record(1))
    list_studies(path)
    assert optuna.logging.get_verbosity() == verbosity
    assert capfd.readouterr() == ("", "")
