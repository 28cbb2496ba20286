"""Measurements in quiet moments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from graphprune.engines.base import Model, Timing
from graphprune.engines.fake import FakeEngine
from graphprune.errors import StepError
from graphprune.timing import quiet
from graphprune.timing.quiet import ALIKE, Stopwatch

DENSE, PRUNED = b"dense", b"pruned"
RETRIES = 4


@dataclass
class Moments(FakeEngine):
    """A machine of changing speed: `(dense, pruned)` seconds of each measurement in turn."""

    times: Iterator[tuple[float, float | None]] = field(default_factory=lambda: iter(()))
    asked: list[int] = field(default_factory=list)

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        self.asked.append(rounds)
        dense, pruned = next(self.times)
        told = {
            DENSE: Timing((dense,) * rounds),
            PRUNED: Timing(error="it does not run") if pruned is None else Timing((pruned,) * rounds),
        }
        return [told[model] for model in models]  # type: ignore[index]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, where measurements are repeated."""
    slept: list[float] = []
    monkeypatch.setattr(quiet, "RETRIES", RETRIES)
    monkeypatch.setattr(quiet.time, "sleep", slept.append)
    return slept


def stopwatch(*times: tuple[float, float | None], fastest: float = 1.0) -> Stopwatch:
    return Stopwatch(Moments(times=iter(times)), DENSE, fastest)


@pytest.mark.parametrize("dense", [0.9, 1.0, ALIKE])
def test_a_quiet_moment_is_enough(dense: float, pauses: list[float]) -> None:
    watch = stopwatch((dense, 0.5))
    assert watch.share(PRUNED, 30).value == 0.5 / dense
    assert watch.engine.asked == [30]  # type: ignore[attr-defined]
    assert watch.fastest == min(1.0, dense)
    assert not pauses


def test_a_slow_moment_is_waited_for_to_end(pauses: list[float]) -> None:
    watch = stopwatch((1.3, 0.8), (1.2, 0.7), (1.01, 0.5), (0.5, 0.1))
    assert watch.share(PRUNED).value == pytest.approx(0.5 / 1.01)
    assert len(pauses) == 2
    assert pauses[1] == 2 * pauses[0]


def test_where_no_moment_is_quiet_the_quietest_counts(pauses: list[float]) -> None:
    watch = stopwatch((1.3, 0.8), (1.1, 0.7), *[(1.4, 0.9)] * (RETRIES - 1))
    assert watch.share(PRUNED).value == pytest.approx(0.7 / 1.1)
    assert len(pauses) == RETRIES


def test_less_is_expected_of_a_machine_that_was_waited_for_in_vain(pauses: list[float]) -> None:
    slow = (1.1, 0.6)
    watch = stopwatch(*[slow] * (RETRIES + 1), slow, slow, (1.0, 0.5))
    for _ in range(3):
        assert watch.share(PRUNED).value == pytest.approx(0.6 / 1.1)
        assert watch.fastest == ALIKE
        assert len(pauses) == RETRIES
    assert watch.share(PRUNED).value == 0.5
    assert watch.fastest == 1.0, "and fast again"


def test_pauses_are_no_longer_than_the_longest(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "LONGEST_PAUSE", 1e-9)
    stopwatch(*[(1.3, 0.8)] * (RETRIES + 1)).share(PRUNED)
    assert pauses == [1e-9] * RETRIES


def test_what_was_the_fastest_moment_so_far_may_be_a_slow_one(pauses: list[float]) -> None:
    watch = stopwatch((1.3, 0.8), (1.0, 0.5), (1.3, 0.8), (1.0, 0.5), fastest=float("inf"))
    assert watch.share(PRUNED).value == pytest.approx(0.8 / 1.3)
    assert watch.share(PRUNED).value == watch.share(PRUNED).value == 0.5, "known better by now"
    assert len(pauses) == 1


def test_a_look_tells_the_speed_of_a_moment(pauses: list[float]) -> None:
    watch = stopwatch((0.8, None), (0.9, None), (1.0, 0.5), (0.8, 0.3))
    watch.look()
    watch.look()
    assert watch.fastest == 0.8
    assert watch.share(PRUNED).value == pytest.approx(0.375)
    assert len(pauses) == 1


def test_a_candidate_that_fails_is_not_tried_again(pauses: list[float]) -> None:
    with pytest.raises(StepError, match="it does not run"):
        stopwatch((1.3, None)).share(PRUNED)
    assert not pauses
