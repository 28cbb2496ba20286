"""Giving up candidates: against enumeration of all draws, and on tasks whose outcome is known."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphprune.tasks.sequential import KEPT, LEVEL, Bar, Judgement, hopeless
from graphprune.tasks.task import Task


@pytest.mark.parametrize("bar", [0.3, 0.5, 0.9])
def test_hopeless_against_the_enumeration_of_all_draws(bar: float) -> None:
    """Of 10 images with as many right answers as the bar needs, how many draws of 6 hold so few of them?"""
    total, seen = 10, 6
    needed = int(np.ceil(bar * total))
    right = [1] * needed + [0] * (total - needed)
    for correct in range(seen + 1):
        fewer = sum(sum(draw) <= correct for draw in combinations(right, seen)) / comb(total, seen)
        impossible = correct + total - seen < needed
        assert hopeless(correct, seen, total, bar) == (impossible or fewer < LEVEL)


def test_what_the_bar_needs_is_never_given_up_at_the_end() -> None:
    for right in range(101):
        assert not hopeless(right, 100, 100, right / 100)
        assert hopeless(right, 100, 100, (right + 1) / 100) or right == 100


def test_candidates_at_the_bar_are_hardly_ever_given_up() -> None:
    rng, lost = np.random.default_rng(0), 0
    for _ in range(2000):
        right = rng.permutation(np.arange(1000) < 700)
        lost += any(hopeless(int(right[:seen].sum()), seen, 1000, 0.7) for seen in range(100, 1000, 100))
    assert lost <= 8  # nine looks at a level of 1e-4: 1.8 expected at most


def test_the_bar_is_the_last_of_the_best() -> None:
    bar, rng = Bar(), np.random.default_rng(0)
    values = rng.random(50)
    for number, value in enumerate(values):
        assert bar.height == (sorted(values[:number])[-KEPT] if number >= KEPT else 0.0)
        bar.raise_by(value)


class Knows(nn.Module):
    """Says the class that is written in the first pixel, or always the class 0; counts the images it has seen."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right, self.images = right, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return nn.functional.one_hot(x[:, 0, 0, 0].long() if self.right else torch.zeros(len(x)).long(), 4).float()


def task() -> Task:
    """400 images of four classes, one class after the other, as folders of images come."""
    targets = torch.arange(4).repeat_interleave(100)
    images = targets[:, None, None, None].float().expand(400, 1, 2, 2)
    batches = [(images[start : start + 50], targets[start : start + 50]) for start in range(0, 400, 50)]
    return Task.from_loaders(None, batches, calibration=[images[:8]])


def test_a_hopeless_model_is_given_up_early_and_a_good_one_judged_whole() -> None:
    shuffled = task().shuffled()
    good, bad = Knows(True), Knows(False)
    assert shuffled.judge(good, 0.9) == Judgement(1.0, 400, 400)
    given_up = shuffled.judge(bad, 0.9)
    assert not given_up.complete
    assert bad.images == given_up.images <= 100
    assert given_up.accuracy == pytest.approx(0.25, abs=0.15)
    assert shuffled.judge(bad, 0.25) == Judgement(0.25, 400, 400)


def test_shuffling_keeps_every_image_with_its_target() -> None:
    plain, shuffled = task(), task().shuffled()
    assert [len(x) for x, _ in shuffled.validation] == [50] * 8
    assert all(bool((x[:, 0, 0, 0] == y).all()) for x, y in shuffled.validation)
    assert sorted(torch.cat([y for _, y in shuffled.validation]).tolist()) == sorted(
        torch.cat([y for _, y in plain.validation]).tolist()
    )
    assert all(len(y.unique()) == 4 for _, y in shuffled.validation)
    assert torch.equal(shuffled.validation[0][0], task().shuffled().validation[0][0])
    assert not torch.equal(shuffled.validation[0][1], task().shuffled(1).validation[0][1])


def test_images_of_different_sizes_stay_in_their_order() -> None:
    batches = [(torch.zeros(2, 1, 4, 4), torch.zeros(2).long()), (torch.zeros(2, 1, 5, 5), torch.ones(2).long())]
    odd = Task.from_loaders(None, batches, calibration=[torch.zeros(2, 1, 4, 4)])
    assert odd.shuffled() is odd


def test_images_in_order_of_their_classes_are_all_read() -> None:
    model = Knows(False)
    assert task().judge(model, 0.9) == Judgement(0.25, 400, 400)
    assert model.images == 400


def test_a_metric_of_the_callers_own_is_read_to_the_end() -> None:
    model = Knows(False)
    own = Task.from_loaders(None, task().validation, calibration=[torch.zeros(2, 1, 2, 2)], metric=lambda y, t: 0.1)
    assert own.judge(model, 0.9) == Judgement(0.1, 400, 400)
    assert model.images == 400
