"""An Optuna sampler behind the action wall, with one that proposes what the test wants in its place."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from graphprune.agents.proposals import search
from graphprune.agents.wall import passes, repaired
from graphprune.searching.environment import reward
from graphprune.searching.problem import Choices, Problem
from tests.agents.test_wall import every
from tests.agents.toys import problem, watched, with_branch


class Stubborn(BaseSampler):
    """Proposes one vector for ever, and keeps what it is told."""

    def __init__(self, wanted: dict[str, int]) -> None:
        self.wanted = wanted
        self.told: list[tuple[dict[str, int], Sequence[float] | None]] = []

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        raise AssertionError("the wall knows the space")

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, int]:
        return self.wanted

    def sample_independent(self, *arguments: Any) -> int:
        raise AssertionError("every site is sampled together with the others")

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        assert state == TrialState.COMPLETE
        self.told.append((trial.params, values))


def run(made: Problem, wanted: dict[str, int]) -> tuple[list[Choices], Stubborn]:
    """The plans evaluated, and the sampler."""
    evaluated = watched(made)
    sampler = Stubborn(wanted)
    search(made, np.random.default_rng(0), lambda seed: sampler, [("maximize", reward)])
    return evaluated, sampler


def test_a_proposal_is_repaired_and_what_was_executed_is_what_is_told() -> None:
    made = problem(3, sizes=(3, 4, 1, 2), limit=0.45, trials=12)
    wanted = {"0": 0, "1": 0, "3": 0}
    evaluated, sampler = run(made, wanted)
    assert evaluated[0] == repaired(made, (0, 0, 0, 0), np.random.default_rng(0)) != (0, 0, 0, 0)
    assert len(evaluated) == len(set(evaluated)) == len(made.records)
    for choices, record, (parameters, values) in zip(evaluated, made.records, sampler.told, strict=True):
        assert parameters == {name: choices[int(name)] for name in wanted}
        assert values == [reward(made, record, choices)]


@pytest.mark.parametrize("made", [problem(2, sizes=(3, 3, 1, 3), limit=0.5, trials=300), with_branch(0, trials=300)])
def test_repeated_proposals_are_varied_until_every_legal_plan_is_known(made: Problem) -> None:
    evaluated, _ = run(made, {"0": 0, "1": 0})
    assert len(evaluated) == len(set(evaluated)) < 300
    assert set(evaluated) == {choices for choices in every(made) if passes(made, choices)}


def test_a_varied_plan_stays_near_the_proposal() -> None:
    made = problem(0, sizes=(4,) * 8, limit=1.0, trials=15)
    evaluated, _ = run(made, {str(site): 1 for site in range(8)})
    assert evaluated[0] == (1,) * 8
    assert all(sum(option != 1 for option in choices) == 1 for choices in evaluated[1:])


def test_optuna_keeps_silent_and_as_verbose_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    logger, before = logging.getLogger("optuna"), optuna.logging.get_verbosity()
    logger.addHandler(caplog.handler)
    try:
        optuna.create_study()
        assert len(caplog.messages) == 1
        run(problem(trials=5), {})
    finally:
        logger.removeHandler(caplog.handler)
    assert len(caplog.messages) == 1
    assert optuna.logging.get_verbosity() == before
