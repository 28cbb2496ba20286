"""How far a candidate's outputs are from the dense model's."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from graphprune.searching import deviation
from graphprune.searching.deviation import Watched, first_outputs

DENSE = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]]))
OFF = (torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[5.0, 9.0]]))


def watched(outputs: Sequence[Tensor], dense: Sequence[Tensor] = DENSE, asked: int | None = None) -> Watched:
    """What watched while a model answered so, batch by batch."""
    answers = iter(outputs)
    made = Watched(lambda _: next(answers), dense)
    for output in outputs[:asked]:
        assert made(torch.zeros(len(output))) is output
    return made


def test_it_is_the_squared_difference_over_the_squared_outputs_of_what_was_asked() -> None:
    assert watched(DENSE).deviation == 0
    assert watched(OFF).deviation == pytest.approx((1 + 9) / (1 + 4 + 9 + 16 + 25 + 36))
    assert watched(OFF, asked=1).deviation == pytest.approx(1 / 30)
    assert watched(OFF, DENSE[:1]).deviation == pytest.approx(1 / 30)
    assert watched([output / 7 for output in OFF], [output / 7 for output in DENSE]).deviation == pytest.approx(10 / 91)


def test_dense_outputs_that_are_nothing_leave_the_difference() -> None:
    assert watched(OFF, [torch.zeros_like(output) for output in OFF]).deviation == pytest.approx(
        1 + 4 + 9 + 25 + 25 + 81
    )


def test_only_so_many_outputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.ones(2, 3)] * 4
    assert len(first_outputs(torch.clone, batches)) == 4
    monkeypatch.setattr(deviation, "LARGEST_OUTPUTS", 13)
    assert len(first_outputs(torch.clone, batches)) == 2
    monkeypatch.setattr(deviation, "LARGEST_OUTPUTS", 1)
    assert len(first_outputs(torch.clone, batches)) == 1
