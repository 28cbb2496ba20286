"""What an agent believes of plans it has not evaluated: the error table, corrected by the records it has seen.

A Gaussian process (Rasmussen and Williams, 2006, algorithm 2.1) over choice vectors. Its mean is a line over the
logarithm of the predicted error; its kernel sums how many sites agree and a linear kernel over the layers' errors.
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
FEWEST = 4
"""Below this many records only the error table counts."""


@dataclass(frozen=True)
class Fit:
    """A posterior: length scale, noise, Cholesky factor [M, M], weights [M] and log marginal likelihood."""

    length: float
    noise: float
    factor: Floats
    weights: Floats
    likelihood: float


class Belief:
    """Predicts rewards of choice vectors; before the first records, by the logarithm of the predicted error alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._unit = max(abs(problem.error(problem.cheapest)), 1e-9)
        self._floor = 1e-3 * self._unit
        self._choices = np.zeros((0, len(problem.decisions)), dtype=np.int64)
        self._rewards = np.zeros(0)
        self._line = (0.0, 1.0)
        self._scale = 1.0
        self._fit: Fit | None = None

    def learn(self, choices: NDArray[np.int64], rewards: Floats) -> None:
        """Add evaluated plans [N, sites] and their rewards [N]."""
        self._choices = np.concatenate([self._choices, choices])
        self._rewards = np.concatenate([self._rewards, rewards])
        spread = float(self._rewards.std())
        if len(self._rewards) < FEWEST or spread == 0:
            return
        self._unit = max(float(np.median(self.problem.error.batch(self._choices))), 1e-9)
        prior = self._prior(self._choices)
        slope = float(np.cov(prior, self._rewards)[0, 1] / max(prior.var(ddof=1), 1e-9))
        slope = max(slope, 0.0)  # a table that misleads says nothing
        self._line = (float(self._rewards.mean() - slope * prior.mean()), slope)
        self._scale = max(float(self._rest().std()), 1e-3 * spread)
        fits = [self._posterior(length, noise) for length in LENGTHS for noise in NOISES]
        self._fit = max(fits, key=lambda fit: fit.likelihood)

    def supposing(self, choices: NDArray[np.int64]) -> "Belief":
        """Another belief, for which these plans [N, sites] turned out as this one has it, so that they are less open.

        The kriging believer (Ginsbourger, Le Riche and Carraro 2010) chooses several plans at once that way.
        """
        other = copy(self)
        other._choices = np.concatenate([self._choices, choices])
        other._rewards = np.concatenate([self._rewards, self.predict(choices)[0]])
        if self._fit is not None:
            other._fit = other._posterior(self._fit.length, self._fit.noise)
        return other

    def predict(self, choices: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the reward of plans [N, sites]."""
        mean = self._line[0] + self._line[1] * self._prior(choices)
        if self._fit is None:
            return mean, np.zeros(len(choices))
        cross = self._kernel(choices, self._choices, self._fit.length)
        explained = (cross * cho_solve((self._fit.factor, True), cross.T).T).sum(axis=1)
        own = 1 + np.square(self._parts(choices)).sum(axis=1)
        return mean + self._scale * (cross @ self._fit.weights), self._scale * np.sqrt(np.maximum(own - explained, 0))

    def _prior(self, choices: NDArray[np.int64]) -> Floats:
        prior: Floats = -np.log(np.maximum(self.problem.error.batch(choices), 0) + self._floor)
        return prior

    def _parts(self, choices: NDArray[np.int64]) -> Floats:
        """Each factor's error, in units of a typical plan's total: [N, factors]."""
        return self.problem.error.parts(choices) / self._unit

    def _kernel(self, left: NDArray[np.int64], right: NDArray[np.int64], length: float) -> Floats:
        """exp(-share of differing sites / length) plus the inner product of the parts: [N, M]."""
        differing = (left[:, None, :] != right[None, :, :]).mean(axis=2)
        kernel: Floats = np.exp(-differing / length) + self._parts(left) @ self._parts(right).T
        return kernel

    def _rest(self) -> Floats:
        """What the line leaves unexplained: [M]."""
        rest: Floats = self._rewards - self._line[0] - self._line[1] * self._prior(self._choices)
        return rest

    def _posterior(self, length: float, noise: float) -> Fit:
        """Condition on the residuals, scaled to unit variance."""
        rest = self._rest() / self._scale
        kernel = self._kernel(self._choices, self._choices, length) + noise * np.eye(len(rest))
        factor = cholesky(kernel, lower=True)
        weights = cho_solve((factor, True), rest)
        return Fit(length, noise, factor, weights, float(-0.5 * rest @ weights - np.log(np.diag(factor)).sum()))
