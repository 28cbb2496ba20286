"""What is said of plans beside each other, and what is taken of them."""

import numpy as np
import pytest
import signals
import torch

from tests.agents.toys import problem


def line(wrong: float, deviation: float, unseen: float) -> signals.Line:
    """A plan that looks alike on any number of images."""
    seen = {str(n): {"wrong": wrong, "divergence": deviation / 2, "deviation": deviation} for n in signals.LOOKS}
    return {"error": deviation, "seen": seen, "unseen": unseen}


LINES = [line(0.1, 0.30, 0.80), line(0.105, 0.10, 0.90), line(0.3, 0.05, 0.70)]


def test_signals_are_what_they_say() -> None:
    dense, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    outputs = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    found = signals.signals(outputs, dense, targets)
    high, low = np.exp(2) / (np.exp(2) + 1), 1 / (np.exp(2) + 1)
    assert found["wrong"] == 0.5
    assert found["deviation"] == pytest.approx(8 / 5)
    assert found["divergence"] == pytest.approx((high * np.log(high / low) + low * np.log(low / high)) / 2)
    assert signals.signals(dense, dense, targets) == {"wrong": 0.0, "divergence": 0.0, "deviation": 0.0}


def test_each_order_takes_its_own() -> None:
    assert {name: order(LINES, 1000) for name, order in signals.ORDERS.items()} == {
        "most right": 0, "least deviation": 2, "ranked": 1,
    }  # fmt: skip
    assert signals.taken(LINES, 1000, signals.ORDERS["ranked"]) == pytest.approx(0.9)


def test_the_table_tells_agreement_with_unseen_images() -> None:
    rows = signals.table("toy", LINES).splitlines()
    assert rows[0] == "toy: 3 plans up to 90.0% on unseen images; the better 2 from 80.0%"
    (wrong,) = (row.split()[1:] for row in rows if row.startswith("wrong"))
    (deviation,) = (row.split()[1:] for row in rows if row.startswith("deviation"))
    assert wrong == ["0.50"] * 3 + ["-1.00"] * 3
    assert deviation == ["-0.50"] * 3 + ["1.00"] * 3


def test_plans_are_different_and_meet_the_target() -> None:
    made = problem(0, sizes=(4,) * 8)
    plans = signals.drawn(made, 6)
    assert len(set(plans)) == len(plans) == 6
    assert all(made.allows(plan) for plan in plans)


def test_drawing_ends_where_there_are_no_more_plans() -> None:
    made = problem(0, sizes=(2, 2), limit=0.7)
    assert 1 <= len(signals.drawn(made, 50)) <= 4
