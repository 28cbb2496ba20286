"""Closed-form scores and weights: what a cut costs a layer, which units to keep, and the best weights left.

With moments C and kept features S the weight W C[:,S] C[S,S]^-1 is the least-squares one, and the layer's error is
tr(W (C - C[:,S] C[S,S]^-1 C[S,:]) W^T). Units are removed one batch after another by the Optimal Brain Surgeon score
tr(W_u (C^-1)_uu^-1 W_u^T), with W and C^-1 updated after each batch (Frantar & Alistarh 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphprune.repairing.calibration import Moments

RIDGE = 1e-4
"""Added to the diagonal of the moments, as a share of its mean: calibration data leaves directions unseen."""
MORE_RIDGES = 5
"""How often it is made ten times as large where that is not enough."""
CLOSE, MOST_STEPS, TINY = 1e-8, 200, 1e-300
"""Conjugate gradients stop when the squared residual of each row has fallen to this share, or after so many steps."""
STEPS = 16
"""Removal batches of a ranking: more is closer to one unit at a time and slower."""


def ridged(moments: Moments) -> Tensor:
    """The moments that errors are measured with [groups, features, features], a ridge on the diagonal."""
    matrix = moments.matrix
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + 1e-12
    return matrix


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of moments [..., n, n]; what rounding has made indefinite gets more on the diagonal.

    NaN where that does not help.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    more = RIDGE * torch.diagonal(matrix, dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)[..., None, None]
    for _ in range(MORE_RIDGES):
        if not failed.any():
            return factor
        more = 10 * more
        factor, failed = torch.linalg.cholesky_ex(matrix + more * torch.eye(matrix.shape[-1], dtype=matrix.dtype))
    return factor if not failed.any() else torch.full_like(matrix, torch.nan)


class Loss:
    """What a layer, or some of its outputs, loses when only some features stay and the weights left are the best.

    What all such questions share is computed once. Kept features are indices, the same in each group.
    """

    def __init__(self, moments: Moments, outputs: Tensor | None = None) -> None:
        weight = (moments.weight if outputs is None else moments.weight[:, outputs]).double()
        self.matrix = ridged(moments)
        self.products = weight @ self.matrix
        self.energies = (self.products * weight).sum(2)

    def errors(self, kept: Tensor) -> Tensor:
        """The error of each output [groups, outputs] as a share of the energy of all; 0 (up to the ridge) for all kept.

        With L L^T = C[S,S], the best weights explain |L^-1 C[S,:] w|^2 of the energy of an output with weights w.
        """
        explained = torch.linalg.solve_triangular(self._factor(kept), self.products[:, :, kept].mT, upper=False)
        return self._left(explained.square_().sum(1))

    def error(self, kept: Tensor) -> float:
        """The error of all outputs together."""
        return float(self.errors(kept).sum())

    def masked(self, mask: NDArray[np.bool_]) -> float:
        """The error of all outputs of the only group together, each on the features that its row of a mask keeps.

        `mask` is [outputs, features].
        """
        best = solve_rows(self.matrix[0], self.products[0], mask)
        return float(self._left((best * self.products[0]).sum(1)).sum())

    def best(self, kept: Tensor) -> Tensor:
        """The best weights on kept features: [groups, outputs, kept]."""
        return torch.cholesky_solve(self.products[:, :, kept].mT, self._factor(kept)).mT

    def _factor(self, kept: Tensor) -> Tensor:
        return cholesky(self.matrix[:, kept[:, None], kept])

    def _left(self, explained: Tensor) -> Tensor:
        return (self.energies - explained).clamp_min(0) / self.energies.sum().clamp_min(1e-30)


def solve_rows(matrix: Tensor, target: Tensor, mask: NDArray[np.bool_]) -> Tensor:
    """The rows w [outputs, features] that are zero off the mask, with matrix w = target on it.

    `matrix` [features, features] is symmetric and positive definite. By conjugate gradients on all rows at once, scaled
    by the diagonal: some 40 products of outputs x features^2 multiply-adds, where each row has a system of its own.
    """
    kept, scale = torch.from_numpy(mask), 1 / torch.diagonal(matrix)
    best, rest = torch.zeros_like(target), target * kept
    direction = rest * scale
    power = first = (rest * direction).sum(1, keepdim=True)
    for _ in range(MOST_STEPS):
        change = direction @ matrix * kept
        length = power / (direction * change).sum(1, keepdim=True).clamp_min(TINY)
        best, rest = best + length * direction, rest - length * change
        before, power = power, (rest * rest * scale).sum(1, keepdim=True)
        if bool((power <= CLOSE * first).all()):
            break
        direction = rest * scale + power / before.clamp_min(TINY) * direction
    return best


def inverse(moments: Moments) -> Tensor:
    """The inverse of the moments of the only group [features, features]."""
    return torch.cholesky_inverse(cholesky(ridged(moments)[0]))


def weight_scores(weight: Tensor, moments: Moments | None) -> NDArray[np.float64]:
    """What removing each weight [outputs, features] alone would cost, w^2 / (C^-1)_jj; without moments its square."""
    scores = weight.detach().double().square().flatten(1)
    if moments is not None:
        scores = scores / torch.diagonal(inverse(moments))
    return np.asarray(scores.numpy())


@dataclass(frozen=True)
class Consumer:
    """A dense layer that reads a group: its moments, the features of each unit [units, features per unit], and how much
    its error counts beside that of others.
    """

    moments: Moments
    features: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class ScoreProduct:
    """An attention product that reads a group: moments [width, width] of its scores, the columns of each unit, and how
    much its error counts.
    """

    moments: Tensor
    columns: Tensor
    weight: float = 1.0


def score_error(moments: Tensor, gone: Tensor) -> float:
    """What the scores lose, as a share of their energy, when some columns of queries and keys are gone (a mask)."""
    return float(moments[gone][:, gone].sum() / moments.sum().clamp_min(1e-30))


def rank_units(consumers: Sequence[Consumer | ScoreProduct], units: int) -> NDArray[np.float64]:
    """Scores [units] of a group's units for its consumers: the later a unit is removed, the higher its score."""
    states = [_State(x) if isinstance(x, Consumer) else _ScoreState(x) for x in consumers]
    scores = np.full(units, float(units))
    alive = torch.ones(units, dtype=torch.bool)
    removed, batch = 0, max(1, units // STEPS)
    while removed < units - 1:
        saliency = sum((state.saliency() for state in states), torch.zeros(units, dtype=torch.float64))
        saliency[~alive] = torch.inf
        chosen = torch.argsort(saliency)[: min(batch, units - 1 - removed)]
        for state in states:
            state.remove(chosen)
        alive[chosen] = False
        scores[chosen.numpy()] = removed + np.arange(len(chosen))
        removed += len(chosen)
    return scores


class _State:
    """Weights and inverse moments of one consumer while units are being removed from it."""

    def __init__(self, consumer: Consumer) -> None:
        moments = consumer.moments
        self.features = consumer.features
        self.inverse = inverse(moments)
        self.weight = moments.weight[0].double()
        self.unit = consumer.weight / max(moments.energy, 1e-30)
        self.gone = torch.zeros(len(consumer.features), dtype=torch.bool)

    def saliency(self) -> Tensor:
        """The error that removing each unit alone would add, as a weighted share of the layer's energy."""
        scores = torch.full((len(self.features),), torch.inf, dtype=torch.float64)
        left = self.features[~self.gone]
        blocks = self.inverse[left[:, :, None], left[:, None, :]]
        weights = self.weight[:, left].permute(1, 2, 0)
        scores[~self.gone] = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2)) * self.unit
        return scores

    def remove(self, units: Tensor) -> None:
        """Take units out; the remaining weights take over what they can."""
        columns = self.features[units].reshape(-1)
        block = torch.linalg.inv(self.inverse[columns][:, columns])
        side = self.inverse[:, columns] @ block
        self.weight = self.weight - self.weight[:, columns] @ side.T
        self.inverse = self.inverse - side @ self.inverse[columns]
        self.weight[:, columns] = 0
        self.gone[units] = True


class _ScoreState:
    """The columns of an attention product that are gone. Nothing takes over what they were."""

    def __init__(self, product: ScoreProduct) -> None:
        self.moments, self.columns = product.moments, product.columns
        self.unit = product.weight / product.moments.sum().clamp_min(1e-30)
        self.gone = torch.zeros(len(product.moments), dtype=torch.bool)

    def saliency(self) -> Tensor:
        """The error that removing each unit adds to that of the units that are gone."""
        before = self.moments[self.gone].sum(0)
        blocks = self.moments[self.columns[:, :, None], self.columns[:, None, :]].sum((1, 2))
        return (blocks + 2 * before[self.columns].sum(1)) * self.unit

    def remove(self, units: Tensor) -> None:
        """Take units out."""
        self.gone[self.columns[units].reshape(-1)] = True


def rank_by_magnitude(weights: Sequence[tuple[Tensor, int, Tensor]], units: int) -> NDArray[np.float64]:
    """Data-free scores [units]: the squared norm of all weights of a unit.

    `weights` holds (weight, axis, indices [units, rows]) for each parameter axis that the group runs through.
    """
    scores = np.zeros(units)
    for weight, axis, rows in weights:
        squared = weight.detach().double().square().transpose(0, axis).reshape(weight.shape[axis], -1).sum(1)
        share = squared[rows].sum(1) / squared.sum().clamp_min(1e-30)
        scores += share.cpu().numpy()
    return scores
