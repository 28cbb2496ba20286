"""Which plans of a search are verified first."""

from dataclasses import replace
from itertools import permutations
from math import sqrt

import pytest

from graphprune.plan import Choice, Plan
from graphprune.record import Record
from graphprune.searching.finalists import ranked, standard_error


def record(name: str, accuracy: float | None, deviation: float | None, feasible: bool = True) -> Record:
    """The record of a plan of its own."""
    return Record(Plan("m", (Choice(name, "filter", "half", (0,)),)), accuracy, feasible, deviation=deviation)


BEST, CLOSER, CLOSEST = record("best", 0.90, 0.3), record("closer", 0.895, 0.2), record("closest", 0.85, 0.1)
MISSED, FAILED = record("missed", 0.99, 0.01, feasible=False), record("failed", None, None)
ALL = (BEST, CLOSER, CLOSEST, MISSED, FAILED)


def test_of_accuracies_within_a_standard_error_the_least_deviation_comes_first() -> None:
    for records in permutations(ALL):  # 1,000 images: 0.0095; 100: 0.03; 25: 0.06
        assert ranked(records, 1000) == [CLOSER, BEST, CLOSEST, MISSED]
        assert ranked(records, 20) == [CLOSEST, CLOSER, BEST, MISSED]
        assert ranked(records, 100_000) == [BEST, CLOSER, CLOSEST, MISSED]


def test_a_metric_that_is_no_share_of_images_counts_as_it_is() -> None:
    assert ranked(ALL, 0) == [BEST, CLOSER, CLOSEST, MISSED]
    twin = replace(CLOSEST, accuracy=0.90)
    assert ranked((BEST, CLOSER, twin), 0) == [twin, BEST, CLOSER]


def test_what_was_given_up_is_not_alike() -> None:
    given_up = replace(CLOSER, images=128)
    assert ranked((given_up, BEST), 1000) == [BEST, given_up]


def test_a_plan_comes_once_and_without_deviations_the_most_accurate_comes_first() -> None:
    assert ranked((BEST, BEST), 1000) == [BEST]
    plain = [record(str(n), n / 1000, None) for n in range(890, 901)]
    assert ranked(plain, 1000) == plain[::-1]
    assert ranked((FAILED,), 1000) == []


@pytest.mark.parametrize("images", [50, 1000])
def test_the_standard_error_is_that_of_a_share_and_never_nothing(images: int) -> None:
    assert standard_error(0.8, images) == pytest.approx(sqrt(0.8 * 0.2 / images), rel=0.02)
    assert 0.3 / images < standard_error(1.0, images) < 1 / images
