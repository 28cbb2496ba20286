"""A problem as a Gymnasium environment: one decision after another, judged once all of them are taken."""

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from graphprune.record import Record
from graphprune.searching.problem import Problem

BAND = 0.05
"""How far a plan may miss its budget before its accuracy no longer counts (AutoSculpt, arXiv 2412.18091)."""
FAILURE = -1.0
"""The reward of a plan that could not be evaluated, and of an action that the mask forbids."""
OPTION_FEATURES = 6
STATE_FEATURES = 6
NEVER = 1e6
"""The overrun of what cannot be: options that exclude each other cost infinity."""
BOUND = 10.0
"""Features are clipped to this range, so that the observation space is bounded."""
Observation = dict[str, NDArray[Any]]


def excess(problem: Problem, record: Record, choices: tuple[int, ...]) -> float:
    """By how much of its limit a plan overruns the target, by prediction or, where that is more, as measured; or 0."""
    overrun = problem.overrun(choices)
    if record.measured is not None and "latency" in problem.limits:
        overrun = max(overrun, record.measured.value / problem.limits["latency"])
    return max(0.0, overrun - 1)


def reward(problem: Problem, record: Record, choices: tuple[int, ...]) -> float:
    """Accuracy inside a band around the budget (5 %), minus what the budget is overrun by; -1 for a plan that failed.

    AutoSculpt also withholds the accuracy of plans more than 5 % *below* the budget; here being faster than asked is no
    fault.
    """
    if record.accuracy is None or record.error is not None:
        return FAILURE
    over = excess(problem, record, choices)
    return max(FAILURE, (record.accuracy if over <= BAND else 0.0) - over)


class Prices:
    """What saving one more unit of overrun costs in error, where the sites that are left have to save it.

    Of each site alone, the others dense, the convex hull of its options is a row of steps, each with what it saves and
    at which rate (error added / overrun saved). If the sites that are left take the cheapest steps first, the price is
    the rate of the step at which enough is saved: the multiplier of the knapsack's linear relaxation (Dantzig 1957).
    Sites of one layer save less together than alone, so "enough" is the same share of all steps as it is of what the
    sites that are left can really save.
    """

    def __init__(self, problem: Problem) -> None:
        steps = [(site, *step) for site in range(len(problem.decisions)) for step in _hull(problem, site)]
        sites, self._saved, self._rates = np.array(sorted(steps, key=lambda step: step[2])).reshape(-1, 3).T
        self._sites = sites.astype(np.int64)

    def __call__(self, pressures: NDArray[np.float64], open_sites: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The prices [N] at which the open sites [N, sites] save a share [N] of what they can: 0 where it is 0."""
        if not len(self._rates):
            return np.zeros(len(pressures))
        totals = np.where(open_sites[:, self._sites], self._saved, 0.0).cumsum(axis=1)
        enough = totals >= pressures[:, None] * totals[:, -1:]
        return np.where((pressures > 0) & (totals[:, -1] > 0), self._rates[enough.argmax(axis=1)], 0.0)


def _hull(problem: Problem, site: int) -> Iterator[tuple[float, float]]:
    """The steps (saved, rate) down the lower convex hull of a site's options, rates rising."""
    overruns, errors = problem.alone(site)
    saved, added = overruns[0] - overruns, errors - errors[0]
    here = 0
    while (further := np.flatnonzero(saved > saved[here] + 1e-12)).size:
        rates = (added[further] - added[here]) / (saved[further] - saved[here])
        there = int(further[rates.argmin()])
        yield float(saved[there] - saved[here]), max(float(rates.min()), 0.0)
        here = there


class Observer:
    """Turns prefixes of choice vectors into observations, many at once.

    All figures but the price are exact values of the problem's tables: what an option adds and saves *given what is
    decided*.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sites = len(problem.decisions)
        self.options = max((len(decision.options) for decision in problem.decisions), default=1)
        self._dense = np.array(problem.dense, dtype=np.int64)
        self._cheapest = np.array(problem.completions[0], dtype=np.int64)
        self._base = problem.error(problem.dense)
        self._scale = max(abs(problem.error(problem.cheapest) - self._base), 1e-9)
        self._unit = max(problem.overrun(problem.dense), 1e-9)
        self._prices = Prices(problem)

    @property
    def space(self) -> spaces.Dict:
        """The observation space of one environment."""
        return spaces.Dict(
            {
                "site": spaces.Box(0, self.sites, (1,), np.int64),
                "decided": spaces.Box(-1, self.options - 1, (self.sites,), np.int64),
                "options": spaces.Box(-BOUND, BOUND, (self.options, OPTION_FEATURES), np.float32),
                "state": spaces.Box(-BOUND, BOUND, (STATE_FEATURES,), np.float32),
            }
        )

    def __call__(self, prefixes: NDArray[np.int64]) -> Observation:
        """The observations of N prefixes of one length [N, decided sites]; every array has a leading N."""
        count, site = prefixes.shape
        decided = np.full((count, self.sites), -1, dtype=np.int64)
        decided[:, :site] = prefixes
        return self.observe(decided, site)

    def observe(self, decided: NDArray[np.int64], site: int) -> Observation:
        """The observations of choice vectors [N, sites] in which `site` is decided next and any sites are open (-1)."""
        count = len(decided)
        dense = np.where(decided >= 0, decided, self._dense)
        cheapest = np.where(decided >= 0, decided, self._cheapest)
        high, low = (np.minimum(self.problem.overruns(choices), NEVER) for choices in (dense, cheapest))
        pressure = np.clip((high - 1) / np.maximum(high - low, 1e-6), 0, 1)
        prices = self._prices(pressure, decided < 0) * self._unit / self._scale
        options = np.zeros((count, self.options, OPTION_FEATURES), dtype=np.float32)
        if site < self.sites:
            values = self._option_features(dense, cheapest, site, prices)
            options[:, : values.shape[1]] = np.clip(values, -BOUND, BOUND)
        errors = (self.problem.error.batch(dense) - self._base) / self._scale
        progress = np.full(count, site / max(self.sites, 1))
        state = np.stack([progress, high, low, errors, pressure, np.log(prices + 1e-3) / 3], axis=1)
        return {
            "site": np.full((count, 1), site, dtype=np.int64),
            "decided": decided,
            "options": options,
            "state": np.clip(state, -BOUND, BOUND).astype(np.float32),
        }

    def masks(self, prefixes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The action wall [N, widest site's options]; after the last site every action is shown as open."""
        count, site = prefixes.shape
        if site == self.sites:
            return np.ones((count, self.options), dtype=np.bool_)
        return self._padded(self.problem.masks(prefixes))

    def open_masks(self, decided: NDArray[np.int64], site: int) -> NDArray[np.bool_]:
        """The action wall at an open site of choice vectors [N, sites] in which any sites are open (-1)."""
        return self._padded(self.problem.open_masks(decided, site))

    def _padded(self, legal: NDArray[np.bool_]) -> NDArray[np.bool_]:
        masks = np.zeros((len(legal), self.options), dtype=np.bool_)
        masks[:, : legal.shape[1]] = legal
        return masks

    def _option_features(
        self, dense: NDArray[np.int64], cheapest: NDArray[np.int64], site: int, prices: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """[N, options, 6]: error added (twice: log), cost saved, overrun with the rest cheapest, log rate, regret.

        The regret of an option is how much less it is worth than the site's best, at the price of the rest.
        """
        problem = self.problem
        errors = problem.error.sweep(dense, site, len(problem.decisions[site].options))
        added = (errors - errors[:, :1]) / self._scale * self.sites
        overruns = np.minimum(problem.sweep_overruns(dense, site), NEVER)
        saved = (overruns[:, :1] - overruns) / self._unit * self.sites
        reach = problem.sweep_overruns(cheapest, site)
        floor = np.log(np.maximum(added, 0) + 1e-3)
        rate = floor - np.log(np.maximum(saved, 0) + 1e-3)
        possible = overruns < NEVER
        gained = prices[:, None] * np.where(possible, saved, 0.0)
        worth = np.where(possible, gained - added, -NEVER)
        regret = (worth.max(axis=1, keepdims=True) - worth) / (gained.max(axis=1, keepdims=True) + 1e-3)
        return np.stack([added, floor / 3, saved, reach, rate / 3, regret], axis=2)


class PruningEnv(gymnasium.Env[Observation, np.int64]):  # type: ignore[misc]
    """One pruning decision per site of a problem; version 2.

    ## Description
    The agent walks the sites of a model in order and picks an option for each. When the last one is decided the plan
    is evaluated once, which spends one of the problem's trials.

    ## Action Space
    `Discrete(n)`, n being the widest site's number of options: the index of the option, 0 keeps the site dense.
    `action_masks()` says which indices exist at the current site and leave the target reachable. Any other action
    ends the episode with reward -1 and spends no trial.

    ## Observation Space
    A `Dict`: `site` [1] is the site to decide, `decided` [sites] the options taken so far (-1: none yet), `options`
    [n, 6] and `state` [6] are values of the error and cost tables given what is decided (see `Observer`): what each
    option adds, saves and leaves, how far the plan is, and the price of what the rest has to save (see `Prices`). The
    model graph never changes, so it is not repeated in each observation: it is `problem.graph`.

    ## Rewards
    0 until the last site; then the accuracy if the budget is met within 5 %, minus the overrun. -1 for a failure.
    Rewards are not meant to be discounted (gamma 1).

    ## Starting State
    Nothing is decided. It is always the same: the environment draws no random numbers.

    ## Episode End
    *Terminated*: every site is decided (or the action was forbidden). *Truncated*: no trial is left.

    ## Arguments
    `problem`: the problem to solve.

    ## Version History
    1: first version. 2: prices and regrets.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.observer = Observer(problem)
        self.observation_space = self.observer.space
        self.action_space = spaces.Discrete(self.observer.options)
        self._prefix: tuple[int, ...] = ()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode: nothing is decided."""
        super().reset(seed=seed)
        self._prefix = ()
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decide the next site. The record of a finished plan is `info["record"]`."""
        if self.problem.remaining <= 0:
            return self._observation(), 0.0, False, True, {}
        if not self.action_masks()[int(action)]:
            return self._observation(), FAILURE, True, False, {}
        self._prefix = (*self._prefix, int(action))
        if len(self._prefix) < self.observer.sites:
            return self._observation(), 0.0, False, False, {}
        record = self.problem.evaluate(self._prefix)
        value = reward(self.problem, record, self._prefix)
        return self._observation(), value, True, self.problem.remaining <= 0, {"record": record}

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now: [n]."""
        only: NDArray[np.bool_] = self.observer.masks(self._prefixes())[0]
        return only

    def _prefixes(self) -> NDArray[np.int64]:
        return np.array([self._prefix], dtype=np.int64).reshape(1, len(self._prefix))

    def _observation(self) -> Observation:
        return {name: values[0] for name, values in self.observer(self._prefixes()).items()}
