"""Sites that are alike: clustered by how the importance of their units is distributed.

Fan, Mu and Zhang, ECCV 2022 (arXiv 2109.10591): importance less its median, a Gaussian kernel density on 1000 points in
[-15, 15], Euclidean distance between densities, Ward linkage. Ours: importance is taken relative to its mean at the
site, and all deviations are divided by their common standard deviation, because importance here is a share of energy or
a mean of |weight|, whose deviations would all lie between two of the points; the bandwidth is Scott's, but never less
than the distance of two points, so that equal importances have a density too; sites without importance (branches) are a
cluster of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.neighbors import KernelDensity

from graphprune.searching.problem import Decision, Floats

GRID = np.linspace(-15.0, 15.0, 1000)
"""Where densities are compared, in standard deviations of all sites together."""
Labels = NDArray[np.int64]


def deviations(importance: Sequence[float]) -> Floats:
    """How far the importance of each unit lies from the median, in units of the mean: [units]."""
    values = np.array(importance, dtype=np.float64)
    return np.asarray((values - np.median(values)) / max(float(values.mean()), 1e-12))


def density(values: Floats) -> Floats:
    """The Gaussian kernel density of some values [units] on the grid: [1000]."""
    bandwidth = max(float(values.std()) * len(values) ** -0.2, GRID[1] - GRID[0])
    estimate = KernelDensity(bandwidth=bandwidth).fit(values[:, None])
    return np.asarray(np.exp(estimate.score_samples(GRID[:, None])))


@dataclass(frozen=True, eq=False)
class Dendrogram:
    """The tree of `sites` (the numbers of those with importance) among `count` sites; `links` is scipy's linkage."""

    count: int
    sites: Labels
    links: Floats

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> Self:
        """Build the tree of a problem's decisions."""
        sites = np.array([number for number, decision in enumerate(decisions) if decision.importance], dtype=np.int64)
        if len(sites) < 2:
            return cls(len(decisions), sites, np.zeros((0, 4)))
        shifted = [deviations(decisions[site].importance) for site in sites]
        scale = max(float(np.concatenate(shifted).std()), 1e-12)
        densities = np.stack([density(values / scale) for values in shifted]).round(9)  # what is equal shall stay so
        return cls(len(decisions), sites, linkage(densities, method="ward"))

    def cut(self, clusters: int) -> Labels:
        """The cluster of each site [count], from 0: at most so many, and one more for sites without importance.

        Cuts of one tree are nested. With fewer clusters than sites, equal densities are never parted.
        """
        labels = np.full(self.count, -1, dtype=np.int64)
        labels[self.sites] = fcluster(self.links, clusters, "maxclust") if len(self.links) else 0
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)
