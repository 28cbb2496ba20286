"""What an agent believes of plans it has not evaluated: the error table, corrected by the records it has seen.

A Gaussian process (Rasmussen and Williams, 2006, algorithm 2.1) over choice vectors. Its mean is a line over the
logarithm of the sum of the layers' errors; its kernel sums how many sites agree and a linear kernel over each layer's
share of that sum: what a layer's errors turn out to weigh changes the logarithm by its share of it. The records choose
the length scale, the spread of those weights and the noise by the marginal likelihood.
"""

from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

from graphprune.searching.problem import Factor, Floats, Problem, Sum

LENGTHS = (0.05, 0.15, 0.4)
"""Candidate length scales of the agreement kernel, as shares of the sites."""
SPREADS = (0.5, 1.0, 2.0)
"""Candidate standard deviations of what a layer's share is worth, in units of what the line leaves unexplained."""
NOISES = (1e-3, 3e-2, 0.3)
"""Candidate noise variances, as shares of what the line leaves unexplained."""
POWER = 0.85
"""Of the layers' errors in their sum: between 0.75 and 1 networks hardly differ, and few records cannot tell."""
FLOOR = 1e-3
"""Added to a power sum whose unit is that of a typical plan, so that plans without error have a logarithm."""
EXPLORATION = 1.0
"""Standard deviations added to the believed reward when candidates are ranked (an upper confidence bound)."""
FEWEST = 4
"""Below this many records only the error table counts."""
DOUBT, MOST_DOUBT = 0.5, 2.0
"""Standard deviation of the logarithm of a layer's weight before there are records, and the most it may ever be off."""


def powered(error: Sum, power: float) -> Sum:
    """The sum of a power of the layers' errors."""
    factors = (Factor(own.sites, np.maximum(own.table, 0.0) ** power) for own in error.factors)
    return Sum(max(error.constant, 0.0) ** power, tuple(factors))


Setting = tuple[float, float, float]
"""Length scale, spread and noise."""


def _kernel(likeness: tuple[Floats, Floats], setting: Setting) -> Floats:
    """exp(-share of differing sites / length) plus the inner product of the shares times the spread: [N, M]."""
    differing, shared = likeness
    kernel: Floats = np.exp(-differing / setting[0]) + setting[1] ** 2 * shared
    return kernel


@dataclass(frozen=True)
class Fit:
    """A posterior: the line (offset, slope) over the logarithm, the scale of what it leaves, the setting (length scale,
    spread, noise), Cholesky factor [M, M], weights [M], and log marginal likelihood.
    """

    line: tuple[float, float]
    scale: float
    setting: Setting
    factor: Floats
    weights: Floats
    likelihood: float


class Belief:
    """Predicts rewards of choice vectors; before the first records, by the logarithm of the sum of errors alone."""

    def __init__(self, problem: Problem, power: float = POWER) -> None:
        self.error = powered(problem.error, power)
        self._unit = max(self.error(problem.cheapest), 1e-9)
        self._choices = np.zeros((0, len(problem.decisions)), dtype=np.int64)
        self._rewards = np.zeros(0)
        self._fit: Fit | None = None

    def learn(self, choices: NDArray[np.int64], rewards: Floats) -> None:
        """Add evaluated plans [N, sites] and their rewards [N]."""
        self._choices = np.concatenate([self._choices, choices])
        self._rewards = np.concatenate([self._rewards, rewards])
        if len(self._rewards) < FEWEST or self._rewards.std() == 0:
            return
        line = self._line()
        settings = [(length, spread, noise) for length in LENGTHS for spread in SPREADS for noise in NOISES]
        alike = self._likeness(self._choices, self._choices)
        fits = (self._posterior(*line, setting, alike) for setting in settings)
        self._fit = max(fits, key=lambda fit: fit.likelihood)

    def supposing(self, choices: NDArray[np.int64]) -> "Belief":
        """Another belief, for which these plans [N, sites] turned out as this one has it, so that they are less open.

        The kriging believer (Ginsbourger, Le Riche and Carraro 2010) chooses several plans at once that way.
        """
        other = copy(self)
        other._choices = np.concatenate([self._choices, choices])
        other._rewards = np.concatenate([self._rewards, self.predict(choices)[0]])
        if (fit := self._fit) is not None:
            alike = other._likeness(other._choices, other._choices)
            other._fit = other._posterior(fit.line, fit.scale, fit.setting, alike)
        return other

    def predict(self, choices: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the reward of plans [N, sites]."""
        if (fit := self._fit) is None:
            return self._prior(choices), np.zeros(len(choices))
        mean = fit.line[0] + fit.line[1] * self._prior(choices)
        cross = _kernel(self._likeness(choices, self._choices), fit.setting)
        explained = (cross * cho_solve((fit.factor, True), cross.T).T).sum(axis=1)
        own = 1 + np.square(fit.setting[1] * self._shares(choices)).sum(axis=1)
        return mean + fit.scale * (cross @ fit.weights), fit.scale * np.sqrt(np.maximum(own - explained, 0))

    def errors(self, noise: Floats) -> Sum:
        """The errors of the layers by weights as they are believed, some deviations `noise` [factors] from the mean.

        That the reward rises by w for all of a layer's share of the sum means that the share is exp(-w / slope) as
        large as it seems. Where the noise is normal, a plan that is best by these errors is drawn by the chance that it
        is the best (Thompson 1933).
        """
        if (fit := self._fit) is None:
            logarithms = DOUBT * noise
        else:
            spread, shares = fit.setting[1], self._shares(self._choices)
            explained = solve_triangular(fit.factor, spread**2 * shares, lower=True)
            covariance = spread**2 * np.eye(shares.shape[1]) - explained.T @ explained
            values, vectors = np.linalg.eigh(covariance)
            worth = spread**2 * shares.T @ fit.weights + vectors @ (np.sqrt(np.maximum(values, 0)) * noise)
            logarithms = -fit.scale * worth / max(fit.line[1], 1e-9)
        weights = np.exp(np.clip(logarithms, -MOST_DOUBT, MOST_DOUBT))
        return self.error.weighted(weights)

    def _prior(self, choices: NDArray[np.int64]) -> Floats:
        prior: Floats = -np.log(np.maximum(self.error.batch(choices), 0) / self._unit + FLOOR)
        return prior

    def _shares(self, choices: NDArray[np.int64]) -> Floats:
        """Each factor's share of the sum: [N, factors]."""
        parts = self.error.parts(choices)
        shares: Floats = parts / (parts.sum(axis=1, keepdims=True) + FLOOR * self._unit)
        return shares

    def _likeness(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """The share of differing sites, and the inner product of the shares of the sum: [N, M] each."""
        differing = (left[:, None, :] != right[None, :, :]).mean(axis=2)
        return differing, self._shares(left) @ self._shares(right).T

    def _line(self) -> tuple[tuple[float, float], float]:
        """Offset and slope of the rewards over the logarithm, and the standard deviation of what is left."""
        prior = self._prior(self._choices)
        slope = float(np.cov(prior, self._rewards)[0, 1] / max(prior.var(ddof=1), 1e-9))
        slope = max(slope, 0.0)  # a table that misleads says nothing
        offset = float(self._rewards.mean() - slope * prior.mean())
        left = self._rewards - offset - slope * prior
        return (offset, slope), max(float(left.std()), 1e-3 * float(self._rewards.std()))

    def _posterior(
        self, line: tuple[float, float], scale: float, setting: Setting, likeness: tuple[Floats, Floats]
    ) -> Fit:
        """Condition on what the line leaves unexplained."""
        covariance = _kernel(likeness, setting) + setting[2] * np.eye(len(self._choices))
        factor = np.asarray(cholesky(covariance, lower=True))
        rest = (self._rewards - line[0] - line[1] * self._prior(self._choices)) / scale
        weights = cho_solve((factor, True), rest)
        likelihood = float(-0.5 * rest @ weights - np.log(np.diag(factor)).sum() - len(rest) * np.log(scale))
        return Fit(line, scale, setting, factor, weights, likelihood)


def promise(belief: Belief, plans: NDArray[np.int64], exploration: float = EXPLORATION) -> NDArray[np.float64]:
    """The upper confidence bound of the reward of plans [N, sites]: [N]."""
    mean, deviation = belief.predict(plans)
    bound: NDArray[np.float64] = mean + exploration * deviation
    return bound
