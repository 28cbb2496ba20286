"""Targets: bounds as shares of the dense model, and what is no target."""

import math

import pytest

from graphprune.errors import InputError
from graphprune.target import Target

DENSE = {"latency": 4e-3, "flops": 8e8, "params": 5e5}


@pytest.mark.parametrize(
    ("target", "bounds"),
    [
        (Target(latency=0.5), {"latency": 0.5}),
        (Target(flops=0.25, params=1.0), {"flops": 0.25, "params": 1.0}),
        (Target(latency_ms=3), {"latency": 0.75}),  # 3 ms of 4 ms
        (Target(flops_g=0.2), {"flops": 0.25}),  # 2e8 of 8e8
        (Target(params_m=0.1), {"params": 0.2}),  # 1e5 of 5e5
        (Target(latency=0.5, latency_ms=3), {"latency": 0.5}),
        (Target(latency=0.9, latency_ms=3), {"latency": 0.75}),
        (Target(latency_ms=8), {"latency": 2.0}),  # looser than the dense model: it holds of itself
        (Target(latency=0.5, flops_g=0.4, params=0.3), {"latency": 0.5, "flops": 0.5, "params": 0.3}),
    ],
)
def test_bounds_are_shares_of_the_dense_model(target: Target, bounds: dict[str, float]) -> None:
    assert target.shares(DENSE) == pytest.approx(bounds)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
@pytest.mark.parametrize("name", ["latency", "flops", "params", "latency_ms", "flops_g", "params_m"])
def test_a_bound_is_positive(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"target {name} must be positive"):
        Target(**{name: value})


@pytest.mark.parametrize("name", ["latency", "flops", "params"])
def test_a_share_is_at_most_one(name: str) -> None:
    assert Target(**{name: 1.0}).shares(DENSE) == {name: 1.0}
    with pytest.raises(InputError, match=f"target {name} is a share .* not 1.5"):
        Target(**{name: 1.5})


def test_something_must_be_asked_for() -> None:
    with pytest.raises(InputError, match="at least one bound"):
        Target()
