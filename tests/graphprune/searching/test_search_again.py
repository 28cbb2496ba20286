"""A search repeated, killed and resumed, and what its study keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphprune.engines.fake import FakeEngine
from graphprune.result import Result
from graphprune.searching import verification
from graphprune.searching.probing import PROBES
from graphprune.searching.study import Study, label, list_studies
from graphprune.target import Target
from tests.graphprune.small_search import Builds, counted_builds, run, shared_cache  # noqa: F401 - fixtures
from tests.graphprune.tiny import fitted, task


def test_same_seed_same_plans() -> None:
    torch.manual_seed(1)
    first = run(seed=3)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002 (the point of the test)
    second, other = run(seed=3), run(seed=4)
    assert [record.plan for record in first.records] == [record.plan for record in second.records]
    assert first.plan == second.plan
    assert all(torch.equal(v, second.model.state_dict()[n]) for n, v in first.model.state_dict().items())
    assert [record.plan for record in first.records] != [record.plan for record in other.records]


def test_a_second_run_evaluates_nothing_anew_and_a_killed_one_loses_the_trial_in_flight(
    tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "LOOSENED", ())
    whole = run(study=tmp_path / "whole.db")
    needed = len(builds.cuts)
    assert needed > PROBES + 3
    distinct = len({record.plan for record in whole.records})
    stored = stored_records(tmp_path / "whole.db")
    verified = needed - len(stored)
    assert verified >= 1, "what is verified is built again and not stored"
    assert len(stored) >= distinct

    builds.restart()
    again = run(study=tmp_path / "whole.db")
    assert len(builds.cuts) == verified, "nothing is evaluated anew"
    assert stored_records(tmp_path / "whole.db") == stored
    same(again, whole)

    for killed_at in (2, PROBES + 3, len(stored) + 1):
        file = tmp_path / f"{killed_at}.db"
        builds.restart(stop_at=killed_at)
        with pytest.raises(KeyboardInterrupt):
            run(study=file)
        assert len(stored_records(file)) == killed_at - 1
        builds.restart()
        same(run(study=file), whole)
        assert len(builds.cuts) == needed - (killed_at - 1)


def test_one_that_is_killed_while_room_is_given_back_ends_the_same(tmp_path: Path, builds: Builds) -> None:
    whole = run(study=tmp_path / "whole.db")
    needed = len(builds.cuts)
    assert needed - len(stored_records(tmp_path / "whole.db")) > 1, "more than one plan is verified"
    for killed_at in (needed - 1, needed):
        file = tmp_path / f"{killed_at}.db"
        builds.restart(stop_at=killed_at)
        with pytest.raises(KeyboardInterrupt):
            run(study=file)
        builds.restart()
        same(run(study=file), whole)


def test_a_search_that_goes_on_keeps_what_it_verified(tmp_path: Path) -> None:
    """On a noisy engine another measurement would take another plan, and a fine-tuning that goes on would be lost."""
    ends = [run(study=tmp_path / "study.db", engine=FakeEngine(noise=0.3, seed=4)) for _ in range(3)]
    assert len({end.plan for end in ends}) == 1
    assert len({end.record.measured for end in ends}) == 1


def stored_records(file: Path) -> list[str]:
    (summary,) = list_studies(file)
    return [record.to_json() for record in Study.open(file, summary.name).records()]


def same(one: Result, other: Result) -> None:
    assert one.plan == other.plan
    assert [r.plan for r in one.records] == [r.plan for r in other.records]
    assert [r.accuracy for r in one.records] == [r.accuracy for r in other.records]
    assert all(torch.equal(v, other.model.state_dict()[n]) for n, v in one.model.state_dict().items())


def test_other_weights_data_labels_or_engines_are_another_study(tmp_path: Path) -> None:
    file, work = tmp_path / "study.db", task()
    swapped = tuple((x, targets.roll(1)) for x, targets in work.validation if targets is not None)
    moved = (work.calibration[0].roll(1, 0), *work.calibration[1:])
    runs: list[dict[str, Any]] = [
        {}, {"model": fitted(1)}, {"task": replace(work, validation=swapped)},
        {"task": replace(work, calibration=moved)},
        {"engine": FakeEngine(seed=1)},
    ]  # fmt: skip
    for number, options in enumerate(runs, start=1):
        result = run(trials=1, agent="magnitude", study=file, **options)
        assert result.record.accuracy == (options.get("task") or work).accuracy(result.model)
        assert len(list_studies(file)) == number
    run(trials=1, agent="magnitude", study=file)
    assert len(list_studies(file)) == len(runs)


def test_searches_with_other_patterns_share_a_study_and_its_columns(tmp_path: Path) -> None:
    """The same plan is not judged on all images twice, and every choice is a column, whichever search came first."""
    file = tmp_path / "study.db"
    for names in (("filter",), ("kernel",), None):
        run(Target(latency=0.8), trials=4, study=file, patterns=names)
    (summary,) = list_studies(file)
    study = Study.open(file, summary.name)
    records = study.records()
    assert len({record.plan for record in records if not record.images}) == sum(not r.images for r in records)
    assert {choice.pattern for record in records for choice in record.plan.choices} == {"filter", "kernel"}
    for record in records:
        shown = study._params(record.plan)
        for choice in record.plan.choices:
            assert shown[choice.site] == label(choice.pattern, choice.level)


def test_a_search_repeated_on_a_noisy_engine_goes_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: Builds
) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    first, second = (run(engine=FakeEngine(noise=0.05), study=tmp_path / "study.db", trials=8) for _ in range(2))
    assert [record.plan for record in first.records] == [record.plan for record in second.records]
