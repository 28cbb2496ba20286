"""Optuna's samplers under the action wall: they propose, the wall corrects, and what was evaluated is what they learn.

Every site is one categorical parameter with all of its options. Masked options could be left out of what a trial
suggests, but Optuna allows no parameter to change its choices, so each mask would need a parameter of its own, and what
is learnt of a site would be torn into as many pieces as prefixes lead to it. So the space stays whole and a proposal
is repaired *within* the sampler (as Optuna's own PartialFixedSampler overrules the one that it holds): the trial then
holds the executed vector and nothing else, generations included. Sites inside a branch that is gone are dense there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from graphprune.agents.wall import OPEN, repaired
from graphprune.errors import StepError
from graphprune.record import Record
from graphprune.searching.problem import Choices, Problem
from graphprune.searching.storage import one_line

ATTEMPTS = 100
"""How often a plan that was evaluated before is varied, by ever more sites, before the search counts as exhausted."""
Objective = tuple[str, Callable[[Problem, Record, Choices], float]]
"""A direction, "maximize" or "minimize", and a value."""


class Walled(BaseSampler):  # type: ignore[misc]
    """Another sampler whose proposals are repaired, and varied where they were evaluated before.

    Sites for which the other sampler proposes nothing (its first trials, mutations) are drawn uniformly from what the
    wall leaves. `tried` is the caller's, who adds what is evaluated.
    """

    def __init__(self, inner: BaseSampler, problem: Problem, tried: set[Choices], rng: np.random.Generator) -> None:
        self.inner = inner
        self.problem = problem
        self.tried = tried
        self.rng = rng
        self.space: dict[str, BaseDistribution] = {
            str(site): CategoricalDistribution(tuple(range(len(decision.options))))
            for site, decision in enumerate(problem.decisions)
            if len(decision.options) > 1
        }

    def choices(self, parameters: dict[str, int], missing: int = 0) -> Choices:
        """The choice vector of a trial's parameters; a site that is no parameter has only its dense option."""
        return tuple(
            parameters.get(name, missing) if (name := str(site)) in self.space else 0
            for site in range(len(self.problem.decisions))
        )

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All sites at once, from the first trial on."""
        return self.space

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, int]:
        """A new legal plan; an old one only where no new one turns up."""
        proposal = self.choices(self.inner.sample_relative(study, trial, search_space), missing=OPEN)
        plan = self._new(proposal)
        return {name: plan[int(name)] for name in search_space}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """Never needed, since every parameter is sampled relative to the others."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Passed on."""
        self.inner.after_trial(study, trial, state, values)

    def _new(self, proposal: Choices) -> Choices:
        plan = repaired(self.problem, proposal, self.rng)
        sites = len(plan)
        for attempt in range(ATTEMPTS):
            if plan not in self.tried:
                break
            varied = np.array(plan, dtype=np.int64)
            varied[self.rng.choice(sites, size=min(sites, 1 + attempt * sites // ATTEMPTS), replace=False)] = OPEN
            candidate = repaired(self.problem, varied.tolist(), self.rng)
            plan = candidate if candidate not in self.tried else plan
        return plan


def search(
    problem: Problem, rng: np.random.Generator, sampler: Callable[[int], BaseSampler], objectives: Sequence[Objective]
) -> None:
    """Ask and tell until the trials are spent or no new plan turns up. `sampler` makes Optuna's sampler from a seed."""
    tried: set[Choices] = set()
    with one_line("Optuna cannot begin a search", StepError):
        walled = Walled(sampler(int(rng.integers(2**31))), problem, tried, rng)
        study = optuna.create_study(directions=[direction for direction, _ in objectives], sampler=walled)
    while problem.remaining > 0:
        trial = study.ask(walled.space)
        plan = walled.choices(trial.params)
        if plan in tried:
            return
        tried.add(plan)
        record = problem.evaluate(plan)
        study.tell(trial, [value(problem, record, plan) for _, value in objectives])
