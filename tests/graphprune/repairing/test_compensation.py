"""Closed forms against numpy's least squares and against trying every subset."""

from itertools import combinations

import numpy as np
import pytest
import torch

from graphprune.repairing import compensation
from graphprune.repairing.calibration import Moments
from graphprune.repairing.compensation import (
    Consumer,
    Loss,
    ScoreProduct,
    _ScoreState,
    _State,
    rank_by_magnitude,
    rank_units,
    ridged,
    score_error,
    solve_rows,
    weight_scores,
)

Array = np.ndarray


@pytest.fixture
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ridge the closed forms are exact on the very data."""
    monkeypatch.setattr(compensation, "RIDGE", 0.0)


def inputs(rows: int, features: int, seed: int = 0) -> Array:
    """Correlated vectors with a mean."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, features)) @ rng.normal(size=(features, features)) + rng.normal(size=features)


def moments_of(x: Array, weight: Array, free_mean: bool = False) -> Moments:
    """The moments of data [groups, rows, features] with weights [groups, outputs, features]."""
    data = torch.from_numpy(x)
    second = data.mT @ data / data.shape[1]
    return Moments(second, data.mean(1), torch.from_numpy(weight), free_mean)


def problem(features: int = 8, outputs: int = 5, groups: int = 1, free_mean: bool = False) -> tuple[Array, Moments]:
    x = np.stack([inputs(200, features, seed) for seed in range(groups)])
    weight = np.random.default_rng(9).normal(size=(groups, outputs, features))
    return x, moments_of(x, weight, free_mean)


def least_squares(x: Array, moments: Moments, kept: list[int]) -> tuple[Array, float]:
    """numpy's fit of the dense outputs on kept features, group by group, with an intercept where the mean is free."""
    best, lost, total = [], 0.0, 0.0
    for data, weight in zip(x, moments.weight.numpy(), strict=True):
        target = data @ weight.T
        columns = data[:, kept]
        if moments.free_mean:
            target, columns = target - target.mean(0), columns - columns.mean(0)
        fit = np.linalg.lstsq(columns, target, rcond=None)[0]
        best.append(fit.T)
        lost += np.square(target - columns @ fit).sum()
        total += np.square(target).sum()
    return np.stack(best), lost / total


# --- loss -----------------------------------------------------------------------------------------------------------


def solve(moments: Moments, kept: torch.Tensor, outputs: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """The best weights, and the error."""
    loss = Loss(moments, outputs)
    return loss.best(kept), loss.error(kept)


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("free_mean", [False, True])
@pytest.mark.parametrize("kept", [[0, 2, 3, 7], [5], [1, 2, 3, 4, 5, 6, 7]])
def test_solve_is_least_squares_on_the_data(groups: int, free_mean: bool, kept: list[int]) -> None:
    x, moments = problem(groups=groups, free_mean=free_mean)
    weight, error = solve(moments, torch.tensor(kept))
    expected, least = least_squares(x, moments, kept)
    assert weight.shape == (groups, 5, len(kept))
    assert np.allclose(weight, expected, rtol=0, atol=1e-8)
    assert error == pytest.approx(least, rel=1e-8)
    assert 1e-6 < error < 1


def test_the_ridge_moves_the_error_little() -> None:
    x, moments = problem(free_mean=True)
    kept = [0, 1, 4, 6]
    error, least = solve(moments, torch.tensor(kept))[1], least_squares(x, moments, kept)[1]
    assert least != error == pytest.approx(least, rel=0.02, abs=1e-3)


def test_some_outputs_only() -> None:
    _, moments = problem()
    kept, outputs = torch.tensor([0, 3, 4]), torch.tensor([4, 1])
    whole, _ = solve(moments, kept)
    part, error = solve(moments, kept, outputs)
    assert torch.allclose(part, whole[:, outputs], rtol=0, atol=1e-12)
    alone = Moments(moments.second, moments.mean, moments.weight[:, outputs], False)
    assert error == pytest.approx(solve(alone, kept)[1], rel=1e-12)


@pytest.mark.parametrize("free_mean", [False, True])
def test_the_weights_are_a_stationary_point_and_no_neighbour_is_better(free_mean: bool) -> None:
    _, moments = problem(groups=2, free_mean=free_mean)
    kept = torch.tensor([1, 2, 6])
    best, error = solve(moments, kept)
    matrix = ridged(moments)

    def lost(weight: torch.Tensor) -> torch.Tensor:
        gap = moments.weight.clone()
        gap = gap - torch.zeros_like(gap).index_copy(2, kept, weight)
        return torch.einsum("gof,gfe,goe->", gap, matrix, gap)

    weight = best.clone().requires_grad_()
    value = lost(weight)
    value.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-9 * value
    assert error == pytest.approx((value / lost(torch.zeros_like(best))).item(), rel=1e-10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 0.01 * torch.randn(best.shape, generator=generator, dtype=best.dtype)
        assert lost(best + step) > value


def test_keeping_more_never_costs_more() -> None:
    _, moments = problem(features=7)
    errors = {
        kept: solve(moments, torch.tensor(kept))[1] for size in range(1, 8) for kept in combinations(range(7), size)
    }
    for kept, error in errors.items():
        for gone in kept if len(kept) > 1 else ():
            fewer = tuple(feature for feature in kept if feature != gone)
            assert errors[fewer] >= error - 1e-12
    assert errors[tuple(range(7))] < 1e-12


def test_a_dead_input_costs_nothing() -> None:
    x = np.concatenate([inputs(100, 4), np.zeros((100, 2))], 1)[None]
    moments = moments_of(x, np.ones((1, 3, 6)))
    assert solve(moments, torch.tensor([0, 1, 2, 3]))[1] < 1e-3
    dead = moments_of(np.zeros((1, 10, 3)), np.ones((1, 2, 3)))
    weight, error = solve(dead, torch.tensor([0]))
    assert torch.isfinite(weight).all()
    assert 0 <= error <= 1


# --- the ranking ----------------------------------------------------------------------------------------------------


def single(units: int) -> torch.Tensor:
    """One feature for each unit."""
    return torch.arange(units)[:, None]


def order(scores: Array) -> list[int]:
    """The units in the order in which they go; the last one stays."""
    return np.argsort(scores).tolist()


def brute_force_errors(consumers: list[Consumer], units: list[int], gone: int) -> float:
    """The error, added over consumers, of keeping `units` without `gone`, each solved anew."""
    total = 0.0
    for consumer in consumers:
        kept = consumer.features[[unit for unit in units if unit != gone]].flatten()
        total += solve(consumer.moments, kept)[1]
    return total


def test_a_duplicate_and_a_sum_of_others_go_first() -> None:
    x = inputs(500, 6)
    x = np.concatenate([x, x[:, :1], x[:, 1:2] + x[:, 2:3]], 1)  # unit 6 = unit 0, unit 7 = unit 1 + unit 2
    weight = np.random.default_rng(1).normal(size=(1, 10, 8))
    consumer = Consumer(moments_of(x[None], weight), single(8))
    first, second, *_ = order(rank_units([consumer], 8))
    assert len({first, second} & {0, 6}) == 1
    assert len({first, second} & {1, 2, 7}) == 1
    stay = [unit for unit in range(8) if unit not in (first, second)]
    assert solve(consumer.moments, torch.tensor(stay))[1] < 1e-3


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("features", [1, 3])
def test_the_score_is_the_exact_increase_of_the_error(features: int) -> None:
    units = 5
    x = inputs(300, units * features)
    permuted = torch.from_numpy(np.random.default_rng(2).permutation(units * features)).reshape(units, features)
    moments = moments_of(x[None], np.random.default_rng(3).normal(size=(1, 4, units * features)), free_mean=True)
    consumer = Consumer(moments, permuted)
    state = _State(consumer)
    alive = list(range(units))
    for gone in (None, 3, 0):
        if gone is not None:
            state.remove(torch.tensor([gone]))
            alive.remove(gone)
        before = brute_force_errors([consumer], alive, -1)
        for unit in alive:
            increase = brute_force_errors([consumer], alive, unit) - before
            assert state.saliency()[unit].item() == pytest.approx(increase, rel=1e-7)
        assert torch.isinf(state.saliency()).sum() == units - len(alive)
        kept = consumer.features[alive].flatten()
        assert torch.allclose(state.weight[:, kept], solve(moments, kept)[0][0], rtol=0, atol=1e-8)


@pytest.mark.usefixtures("no_ridge")
def test_the_order_is_that_of_removing_the_least_each_time_from_all_consumers() -> None:
    units = 9
    first = Consumer(moments_of(inputs(300, 9)[None], np.random.default_rng(4).normal(size=(1, 3, 9))), single(9))
    wide = moments_of(inputs(300, 18, 1)[None], np.random.default_rng(5).normal(size=(1, 6, 18)), free_mean=True)
    second = Consumer(wide, torch.arange(18).reshape(2, 9).T)
    alive, expected = list(range(units)), []
    while len(alive) > 1:
        gone = min(alive, key=lambda unit: brute_force_errors([first, second], alive, unit))
        expected.append(gone)
        alive.remove(gone)
    scores = rank_units([first, second], units)
    assert order(scores) == [*expected, *alive]
    assert order(scores) != order(rank_units([first], units)) != order(rank_units([second], units))


@pytest.mark.usefixtures("no_ridge")
def test_with_independent_units_every_level_keeps_the_best_subset_there_is() -> None:
    rng = np.random.default_rng(6)
    blocks = [rng.normal(size=(2, 2)) for _ in range(6)]
    second = torch.block_diag(*(torch.from_numpy(block @ block.T + 0.1 * np.eye(2)) for block in blocks))[None]
    moments = Moments(
        second, torch.zeros(1, 12, dtype=torch.float64), torch.from_numpy(rng.normal(size=(1, 4, 12))), False
    )
    features = torch.arange(12).reshape(6, 2)
    ranked = order(rank_units([Consumer(moments, features)], 6))
    for count in range(1, 6):
        errors = {
            kept: solve(moments, features[list(kept)].flatten())[1] for kept in combinations(range(6), count)
        }  # fmt: skip
        assert set(ranked[-count:]) == set(min(errors, key=lambda kept: errors[kept]))


def test_many_units_go_in_batches_and_every_score_differs() -> None:
    units = 50
    consumer = Consumer(moments_of(inputs(400, units)[None], np.eye(units)[None]), single(units))
    scores = rank_units([consumer], units)
    assert sorted(scores) == [*range(units - 1), units]


def test_dead_units_go_first_and_nothing_is_nan() -> None:
    x = inputs(100, 5)
    x[:, [1, 4]] = 0
    scores = rank_units([Consumer(moments_of(x[None], np.ones((1, 3, 5))), single(5))], 5)
    assert set(order(scores)[:2]) == {1, 4}
    dead = rank_units([Consumer(moments_of(np.zeros((1, 10, 4)), np.ones((1, 2, 4))), single(4))], 4)
    assert sorted(dead) == [0, 1, 2, 4]


def test_the_score_of_a_products_columns_is_the_increase_of_the_error() -> None:
    rows = torch.from_numpy(inputs(50, 6))
    product = ScoreProduct(rows.T @ rows, torch.tensor([[0, 3], [4, 1], [2, 5]]))
    state, gone = _ScoreState(product), torch.zeros(6, dtype=torch.bool)
    for unit in (1, 0):
        after = gone.clone()
        after[product.columns[unit]] = True
        increase = score_error(product.moments, after) - score_error(product.moments, gone)
        assert state.saliency()[unit].item() == pytest.approx(increase, rel=1e-10)
        state.remove(torch.tensor([unit]))
        gone = after


def test_columns_that_add_nothing_to_the_scores_go_first() -> None:
    rows = torch.from_numpy(inputs(50, 5))
    rows[:, [1, 4]] = 0
    product = ScoreProduct(rows.T @ rows, torch.arange(5)[:, None])
    assert set(order(rank_units([product], 5))[:2]) == {1, 4}
    consumer = Consumer(moments_of(inputs(300, 5)[None], np.eye(5)[None] * [1, 1, 1e-6, 1, 1]), single(5))
    assert order(rank_units([product, consumer], 5))[0] in (1, 2, 4)


# --- magnitude ------------------------------------------------------------------------------------------------------


def test_magnitude_is_the_share_of_squared_weights_over_all_parameters() -> None:
    rng = np.random.default_rng(7)
    producer, consumer = rng.normal(size=(6, 4, 3, 3)), rng.normal(size=(5, 12, 1, 1))
    rows, columns = np.arange(6).reshape(3, 2), np.arange(12).reshape(3, 4)
    expected = [
        np.square(producer[rows[unit]]).sum() / np.square(producer).sum()
        + np.square(consumer[:, columns[unit]]).sum() / np.square(consumer).sum()
        for unit in range(3)
    ]
    weights = [
        (torch.from_numpy(producer), 0, torch.from_numpy(rows)),
        (torch.from_numpy(consumer), 1, torch.from_numpy(columns)),
    ]
    assert rank_by_magnitude(weights, 3) == pytest.approx(expected, rel=1e-12)
    assert rank_by_magnitude([(torch.zeros(3, 2), 0, torch.arange(3)[:, None])], 3).tolist() == [0, 0, 0]


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("free_mean", [False, True])
def test_each_output_is_solved_on_its_own_features(free_mean: bool) -> None:
    x, moments = problem(free_mean=free_mean)
    kept = np.array([[0, 1, 6], [2, 3, 4], [0, 4, 7], [1, 2, 5], [0, 1, 6]])
    mask = np.zeros((5, 8), dtype=bool)
    np.put_along_axis(mask, kept, True, 1)
    best = solve_rows(moments.matrix[0], (moments.weight @ moments.matrix)[0], mask).numpy()
    lost = 0.0
    for output, features in enumerate(kept):
        alone = Moments(moments.second, moments.mean, moments.weight[:, [output]], free_mean)
        expected, share = least_squares(x, alone, features.tolist())
        np.testing.assert_allclose(best[output, features], expected[0, 0], rtol=1e-6)
        lost += share * alone.energy
    assert not best[~mask].any()
    assert Loss(moments).masked(mask) == pytest.approx(lost / moments.energy)


@pytest.mark.usefixtures("no_ridge")
def test_the_score_of_a_weight_is_what_its_removal_alone_costs() -> None:
    x, moments = problem()
    scores = weight_scores(moments.weight[0], moments)
    for output, feature in ((0, 0), (3, 5)):
        alone = Moments(moments.second, moments.mean, moments.weight[:, [output]], False)
        share = least_squares(x, alone, [kept for kept in range(8) if kept != feature])[1]
        assert scores[output, feature] == pytest.approx(share * alone.energy)
    np.testing.assert_array_equal(weight_scores(moments.weight[0], None), moments.weight[0].numpy() ** 2)


def test_masked_rows_that_are_zero_or_many_are_solved_too() -> None:
    """More features than it takes steps, and an output for which there is nothing to do."""
    x = torch.from_numpy(inputs(400, 64))
    matrix, target = x.T @ x / 400 + 0.1 * torch.eye(64), torch.randn(6, 64, dtype=torch.float64)
    target[2] = 0
    mask = np.tile(np.array([True, False, False, True]), (6, 16))
    best = solve_rows(matrix, target, mask)
    spots = torch.from_numpy(np.flatnonzero(mask[0]))
    exact = torch.linalg.solve(matrix[spots][:, spots], target[:, spots].T).T
    assert (best[:, spots] - exact).norm() < 1e-2 * exact.norm()
    left = (best[:, spots] - exact) @ matrix[spots][:, spots]
    assert (left * (best[:, spots] - exact)).sum() < 1e-5 * (exact * target[:, spots]).sum()
    assert not best[2].any()
