"""Clusters of sites: densities by their formula, Ward's tree by brute force, and groups that are known."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from graphprune.agents.clusters import GRID, Dendrogram, density, deviations
from graphprune.searching.problem import Decision
from tests.agents.toys import decision

STEP = GRID[1] - GRID[0]


def site(importance: np.ndarray) -> Decision:
    """A site whose units have these importances."""
    return replace(decision(1, np.array([0.0, 0.5])), importance=tuple(importance.tolist()))


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    """What belongs together, whatever its number."""
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in labels}


def test_density_is_the_mean_of_normal_densities() -> None:
    values = np.random.default_rng(0).normal(0, 2, 40)
    width = values.std() * 40**-0.2
    bells = np.exp(-0.5 * ((GRID[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    assert density(values) == pytest.approx(bells.mean(axis=1))


@pytest.mark.parametrize("values", [np.zeros(8), np.array([0.3])])
def test_equal_importances_have_a_density_too(values: np.ndarray) -> None:
    found = density(values)
    assert found.sum() * STEP == pytest.approx(1, rel=1e-3)
    assert GRID[found.argmax()] == pytest.approx(values[0], abs=STEP)


def test_deviations_do_not_depend_on_the_unit_of_importance() -> None:
    importance = np.array([1.0, 2.0, 4.0, 5.0, 8.0])
    assert deviations(importance.tolist()) == pytest.approx([-0.75, -0.5, 0.0, 0.25, 1.0])
    assert deviations((7 * importance).tolist()) == pytest.approx(deviations(importance.tolist()))
    assert deviations([0.0, 0.0]).tolist() == [0.0, 0.0]


def ward(points: np.ndarray, clusters: int) -> set[frozenset[int]]:
    """Join the two clusters whose union adds least to the squared distances from the means, until so many are left."""

    def scatter(members: frozenset[int]) -> float:
        own = points[sorted(members)]
        return float(np.square(own - own.mean(axis=0)).sum())

    left = [frozenset({number}) for number in range(len(points))]
    while len(left) > clusters:
        first, second = min(
            combinations(left, 2), key=lambda pair: scatter(pair[0] | pair[1]) - scatter(pair[0]) - scatter(pair[1])
        )
        left = [other for other in left if other not in (first, second)] + [first | second]
    return set(left)


@pytest.mark.parametrize("seed", range(3))
def test_cuts_are_those_of_ward_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    decisions = [site(rng.gamma(rng.uniform(0.5, 5), size=int(rng.integers(8, 64)))) for _ in range(9)]
    shifted = [deviations(made.importance) for made in decisions]
    scale = np.concatenate(shifted).std()
    densities = np.stack([density(values / scale) for values in shifted])
    tree = Dendrogram.of(decisions)
    for clusters in range(1, 10):
        assert partition(tree.cut(clusters)) == ward(densities, clusters)


def test_sites_that_are_drawn_alike_are_found_again() -> None:
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat([0, 1, 2], 5))
    shapes = (lambda: 5 + 0.2 * rng.normal(size=64), lambda: 5 + 2 * rng.random(64), lambda: 1 + rng.gamma(1, size=64))
    tree = Dendrogram.of([site(shapes[kind]()) for kind in group])
    assert partition(tree.cut(3)) == partition(group)


def test_sites_without_importance_are_a_cluster_of_their_own() -> None:
    rng = np.random.default_rng(2)
    empty = np.zeros(0)
    tree = Dendrogram.of([site(empty), *(site(rng.gamma(k + 1, size=32)) for k in range(4)), site(empty)])
    labels = tree.cut(2)
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    assert partition(labels) >= {frozenset({0, 5})}


@pytest.mark.parametrize(
    ("importances", "expected"),
    [
        ([[], []], [0, 0]),
        ([[], [1.0, 2.0]], [0, 1]),
        ([[1.0, 2.0]], [0]),
        ([[3.0, 3.0], [1.0, 1.0], [2.0], [7.0] * 5], [0, 0, 0, 0]),
    ],
)
def test_too_little_to_tell_apart(importances: list[list[float]], expected: list[int]) -> None:
    tree = Dendrogram.of([site(np.array(importance)) for importance in importances])
    assert tree.cut(3).tolist() == expected
