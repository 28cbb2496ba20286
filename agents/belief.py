"""What an agent believes of plans it has not evaluated: the error table, corrected by the records it has seen.

A Gaussian process (Rasmussen and Williams, 2006, algorithm 2.1) over choice vectors. Its mean is a line over the
logarithm of a power sum of the layers' errors; its kernel sums how many sites agree and a linear kernel over the
errors. How much worse one large error is than several small ones differs between networks, so the records choose the
power as they choose the kernel's length scale and the noise: by the marginal likelihood.
"""

from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky

from graphprune.problem import Floats, Problem

LENGTHS = (0.05, 0.15, 0.4)
"""Candidate length scales of the agreement kernel, as shares of the sites."""
NOISES = (1e-3, 3e-2)
"""Candidate noise variances, as shares of the observed variance."""
POWERS = (1.0, 0.75, 0.5, 1.5)
"""Candidate powers of the layers' errors; the first one counts until there are records."""
FLOOR = 1e-3
"""Added to a power sum whose unit is that of a typical plan, so that plans without error have a logarithm."""
EXPLORATION = 1.0
"""Standard deviations added to the believed reward when candidates are ranked (an upper confidence bound)."""
FEWEST = 4
"""Below this many records only the error table counts."""


@dataclass(frozen=True)
class Fit:
    """A posterior: the line (offset, slope) over the power sum, the scale of what it leaves, the setting (length scale,
    noise), Cholesky factor [M, M], weights [M], and log marginal likelihood.
    """

    power: float
    line: tuple[float, float]
    scale: float
    setting: tuple[float, float]
    factor: Floats
    weights: Floats
    likelihood: float


class Belief:
    """Predicts rewards of choice vectors; before the first records, by the logarithm of a power sum of errors alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.power = POWERS[0]
        self._unit = max(abs(problem.error(problem.cheapest)), 1e-9)
        self._choices = np.zeros((0, len(problem.decisions)), dtype=np.int64)
        self._rewards = np.zeros(0)
        self._fit: Fit | None = None

    def learn(self, choices: NDArray[np.int64], rewards: Floats) -> None:
        """Add evaluated plans [N, sites] and their rewards [N]."""
        self._choices = np.concatenate([self._choices, choices])
        self._rewards = np.concatenate([self._rewards, rewards])
        if len(self._rewards) < FEWEST or self._rewards.std() == 0:
            return
        self._unit = max(float(np.median(self.problem.error.batch(self._choices))), 1e-9)
        lines = {power: self._line(power) for power in POWERS}
        factors = {(length, noise): self._factor(length, noise) for length in LENGTHS for noise in NOISES}
        fits = [
            self._posterior(power, *lines[power], setting, factor)
            for power in POWERS
            for setting, factor in factors.items()
        ]
        self._fit = max(fits, key=lambda fit: fit.likelihood)
        self.power = self._fit.power

    def supposing(self, choices: NDArray[np.int64]) -> "Belief":
        """Another belief, for which these plans [N, sites] turned out as this one has it, so that they are less open.

        The kriging believer (Ginsbourger, Le Riche and Carraro 2010) chooses several plans at once that way.
        """
        other = copy(self)
        other._choices = np.concatenate([self._choices, choices])
        other._rewards = np.concatenate([self._rewards, self.predict(choices)[0]])
        if (fit := self._fit) is not None:
            other._fit = other._posterior(fit.power, fit.line, fit.scale, fit.setting, other._factor(*fit.setting))
        return other

    def predict(self, choices: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the reward of plans [N, sites]."""
        if (fit := self._fit) is None:
            return self._prior(choices, self.power), np.zeros(len(choices))
        mean = fit.line[0] + fit.line[1] * self._prior(choices, fit.power)
        cross = self._kernel(choices, self._choices, fit.setting[0])
        explained = (cross * cho_solve((fit.factor, True), cross.T).T).sum(axis=1)
        own = 1 + np.square(self._parts(choices)).sum(axis=1)
        return mean + fit.scale * (cross @ fit.weights), fit.scale * np.sqrt(np.maximum(own - explained, 0))

    def _prior(self, choices: NDArray[np.int64], power: float) -> Floats:
        sums = (np.maximum(self._parts(choices), 0) ** power).sum(axis=1)
        prior: Floats = -np.log(sums + FLOOR)
        return prior

    def _parts(self, choices: NDArray[np.int64]) -> Floats:
        """Each factor's error, in units of a typical plan's total: [N, factors]."""
        return self.problem.error.parts(choices) / self._unit

    def _kernel(self, left: NDArray[np.int64], right: NDArray[np.int64], length: float) -> Floats:
        """exp(-share of differing sites / length) plus the inner product of the parts: [N, M]."""
        differing = (left[:, None, :] != right[None, :, :]).mean(axis=2)
        kernel: Floats = np.exp(-differing / length) + self._parts(left) @ self._parts(right).T
        return kernel

    def _line(self, power: float) -> tuple[tuple[float, float], float]:
        """Offset and slope of the rewards over the power sum, and the standard deviation of what is left."""
        prior = self._prior(self._choices, power)
        slope = float(np.cov(prior, self._rewards)[0, 1] / max(prior.var(ddof=1), 1e-9))
        slope = max(slope, 0.0)  # a table that misleads says nothing
        offset = float(self._rewards.mean() - slope * prior.mean())
        left = self._rewards - offset - slope * prior
        return (offset, slope), max(float(left.std()), 1e-3 * float(self._rewards.std()))

    def _factor(self, length: float, noise: float) -> Floats:
        """The Cholesky factor of the covariance of the records: [M, M]."""
        covariance = self._kernel(self._choices, self._choices, length) + noise * np.eye(len(self._choices))
        return np.asarray(cholesky(covariance, lower=True))

    def _posterior(
        self, power: float, line: tuple[float, float], scale: float, setting: tuple[float, float], factor: Floats
    ) -> Fit:
        """Condition on what the line leaves unexplained."""
        rest = (self._rewards - line[0] - line[1] * self._prior(self._choices, power)) / scale
        weights = cho_solve((factor, True), rest)
        likelihood = float(-0.5 * rest @ weights - np.log(np.diag(factor)).sum() - len(rest) * np.log(scale))
        return Fit(power, line, scale, setting, factor, weights, likelihood)


def promise(belief: Belief, plans: NDArray[np.int64], exploration: float = EXPLORATION) -> NDArray[np.float64]:
    """The upper confidence bound of the reward of plans [N, sites]: [N]."""
    mean, deviation = belief.predict(plans)
    bound: NDArray[np.float64] = mean + exploration * deviation
    return bound
