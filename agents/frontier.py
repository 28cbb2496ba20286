"""The least sum of errors within a budget of cost, where both are sums of tables over a few sites each.

Nonserial dynamic programming (Bertele and Brioschi 1972): sites are decided in the network's order; what is kept is the
least error for every setting of those that later tables still need, the frontier, and for every step of the budget.
Networks are long and thin, so the frontier is narrow: a branch, its width, and the streams that run past. Where it is
not, some sites are held at what a Lagrange multiplier makes of them, and the rest is solved around them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from graphprune.searching.problem import Factor, Floats, Sum

BINS = 500
"""Steps into which the budget is divided. Costs are rounded at random, since alike layers would all go the same way."""
WIDEST = 4000
"""Settings of the frontier and the next site at most; beyond that sites are held."""
ATTEMPTS = 5
"""What is really spent is not quite the budget: it is solved again for one corrected by that, so often at most."""
CLOSE = 0.003
"""Until so small a share of the limit is left."""
MULTIPLIERS = np.geomspace(1e-3, 1e3, 60)
"""Lagrange multipliers, relative to error per cost from the dense to the cheapest setting of each site."""


Setting = NDArray[np.int64]
"""An option for each site [sites]."""


@dataclass(frozen=True)
class Step:
    """A site that is decided: with it as the last one, `sites` are open and the tables with these numbers are complete;
    then the `done` sites are needed no more.
    """

    sites: tuple[int, ...]
    errors: tuple[int, ...]
    costs: tuple[int, ...]
    done: tuple[int, ...]


def steps(count: int, errors: Sequence[Factor], costs: Sequence[Factor]) -> list[Step]:
    """So many sites in the order of the network."""
    last = dict.fromkeys(range(count), -1)
    for factor in (*errors, *costs):
        for site in factor.sites:
            last[site] = max(last[site], *factor.sites)
    frontier, found = tuple[int, ...](), list[Step]()
    for site in range(count):
        sites = (*frontier, site)
        complete = [tuple(n for n, own in enumerate(some) if max(own.sites) == site) for some in (errors, costs)]
        frontier = tuple(own for own in sites if last[own] > site)
        found.append(Step(sites, complete[0], complete[1], tuple(own for own in sites if last[own] <= site)))
    return found


@dataclass
class Budget:
    """What may be spent above the least costs: between what was `enough` and what was too much, `scarce`, so far."""

    room: float
    enough: float = 0.0
    scarce: float = np.inf

    @property
    def unit(self) -> float:
        """What a bin holds."""
        return max(self.room / BINS, 1e-12)

    def needs(self, costs: Sequence[Factor], safe: bool) -> list[Factor]:
        """Costs in whole bins, at most one more than there are: rounded at random, or up where that is to be safe."""
        random, found = np.random.default_rng(0), list[Factor]()
        for own in costs:
            offset = 1 - 1e-9 if safe else random.random(own.table.shape)
            found.append(Factor(own.sites, np.minimum(np.floor(own.table / self.unit + offset), BINS + 1)))
        return found

    def correct(self, left: float) -> None:
        """So much was left; less than nothing is an overrun."""
        guess = self.room + left - (self.unit if left < 0 else 0)
        self.enough, self.scarce = (self.room, self.scarce) if left >= 0 else (self.enough, self.room)
        self.room = guess if self.enough < guess < self.scarce else (self.enough + self.scarce) / 2


class Programme:
    """Solves one sum of errors, with its factors raised to powers or weighted, for one cost."""

    def __init__(self, error: Sum, cost: Sum, sizes: Sequence[int]) -> None:
        self.cost = cost
        self.sizes = tuple(sizes)
        self.steps = steps(len(sizes), error.factors, cost.factors)
        self.held: tuple[int, ...] = ()
        """Sites that are not decided here, since the frontier would be too wide."""
        while (widest := max(self.steps, key=self._width, default=None)) and self._width(widest) > WIDEST:
            self.held = (*self.held, max(widest.sites, key=lambda site: self._sizes[site]))

    @property
    def _sizes(self) -> tuple[int, ...]:
        """How many options of each site are looked at."""
        return tuple(1 if site in self.held else size for site, size in enumerate(self.sizes))

    def _width(self, step: Step) -> int:
        return prod(self._sizes[site] for site in step.sites)

    def least(self, errors: Sum, limit: float) -> Setting | None:
        """The setting [sites] with nearly the least of some errors, factors as those given first, whose cost is within
        a limit; None where there is none.
        """
        start = self._relaxed(errors, limit) if self.held else np.zeros(len(self.sizes), dtype=np.int64)
        if start is None:
            return None
        error, (above, floor) = self._narrowed(errors, start), self._above(start)
        budget, best = Budget(limit - floor), None
        for attempt in range(ATTEMPTS):
            needs = budget.needs(above, safe=best is None and attempt == ATTEMPTS - 1)
            solved = self._solved(error, needs) if budget.room >= 0 else None
            if solved is None:
                break
            found = np.where(np.isin(np.arange(len(solved)), self.held), start, solved)
            left = limit - _value(self.cost, found)
            known = best is not None and np.array_equal(found, best)  # nothing is between it and what costs too much
            if left >= 0 and (best is None or _value(errors, found) < _value(errors, best)):
                best = found
            if known or 0 <= left <= CLOSE * limit:
                break
            budget.correct(left)
        return best

    def _solved(self, errors: Sequence[Factor], needs: Sequence[Factor]) -> Setting | None:
        """The setting of least error that needs no more than all bins."""
        table, known, past = np.zeros(BINS + 1), tuple[int, ...](), list[tuple[Step, Floats, list[NDArray[np.int16]]]]()
        for step in self.steps:
            assert known == step.sites[:-1]
            table = np.repeat(table[..., None, :], self._sizes[step.sites[-1]], axis=-2)
            for number in step.errors:
                table = table + self._spread(errors[number], step.sites)[..., None]
            need = sum((self._spread(needs[number], step.sites) for number in step.costs), np.zeros(()))
            table, chosen, known = _shifted(table, need), [], step.sites
            for site in step.done:
                axis = known.index(site)
                chosen.append(table.argmin(axis=axis).astype(np.int16))
                table, known = table.min(axis=axis), tuple(own for own in known if own != site)
            past.append((step, need, chosen))
        if not np.isfinite(table[-1]):
            return None
        found: Setting = np.zeros(len(self.sizes), dtype=np.int64)
        left = BINS
        for step, need, chosen in reversed(past):
            gone = list(step.done)
            while gone:
                site, options = gone.pop(), chosen.pop()
                others = [own for own in step.sites if own not in (*gone, site)]
                found[site] = options[(*found[others], left)]
            if need.ndim:
                spot = [found[site] if need.shape[axis] > 1 else 0 for axis, site in enumerate(step.sites)]
                left -= int(need[tuple(spot)])
        return found

    def _narrowed(self, total: Sum, start: Setting) -> list[Factor]:
        """The factors of a sum at what is held."""
        found = []
        for factor in total.factors:
            options = [[start[site]] if site in self.held else range(self.sizes[site]) for site in factor.sites]
            found.append(Factor(factor.sites, factor.table[np.ix_(*options)]))
        return found

    def _above(self, start: Setting) -> tuple[list[Factor], float]:
        """What everything costs above the least of each factor, at what is held, and the sum of all these least."""
        cost = self._narrowed(self.cost, start)
        floors = [float(factor.table.min()) for factor in cost]
        above = [Factor(own.sites, own.table - floor) for own, floor in zip(cost, floors, strict=True)]
        return above, self.cost.constant + sum(floors)

    def _spread(self, factor: Factor, sites: Sequence[int]) -> Floats:
        """A factor's table with an axis for each of some sites, of length 1 where it does not depend on them."""
        order = np.argsort([sites.index(site) for site in factor.sites])
        shape = [self._sizes[site] if site in factor.sites else 1 for site in sites]
        return np.asarray(factor.table.transpose(order).reshape(shape))

    def _relaxed(self, errors: Sum, limit: float) -> Setting | None:
        """A setting within the limit that coordinate descent finds at the least multiplier; None if there is none."""
        setting = np.zeros((1, len(self.sizes)), dtype=np.int64)
        spans = (
            [total.sweep(setting, site, size)[0] for site, size in enumerate(self.sizes)]
            for total in (errors, self.cost)
        )
        unit, saved = (sum(float(np.ptp(values[np.isfinite(values)])) for values in span) for span in spans)
        for multiplier in MULTIPLIERS * unit / max(saved, 1e-12):
            setting = self._descended(errors, multiplier, setting)
            if self.cost.batch(setting)[0] <= limit:
                return np.asarray(setting[0])
        return None

    def _descended(self, errors: Sum, multiplier: float, start: Setting) -> Setting:
        """Coordinate descent of error + multiplier x cost from a setting [1, sites]."""
        setting, before = start.copy(), -np.ones_like(start)
        while not np.array_equal(setting, before):
            before = setting.copy()
            for site, size in enumerate(self.sizes):
                value = errors.sweep(setting, site, size)[0] + multiplier * self.cost.sweep(setting, site, size)[0]
                if value.min() < value[setting[0, site]]:
                    setting[0, site] = value.argmin()
        return setting


def _value(total: Sum, setting: Setting) -> float:
    """A sum at a setting."""
    return float(total.batch(setting[None])[0])


def _shifted(table: Floats, need: Floats) -> Floats:
    """A table [..., bins] in which everything costs so many bins [...] more."""
    if not need.any():
        return table
    source = np.arange(BINS + 1) - np.broadcast_to(need, table.shape[:-1])[..., None].astype(np.int64)
    moved = np.take_along_axis(table, np.maximum(source, 0), axis=-1)
    return np.where(source < 0, np.inf, moved)


def weighted(error: Sum, exponent: float, weights: Iterable[float]) -> Sum:
    """Errors whose factors are raised to a power, with their sign kept, and weighted."""
    powers = (Factor(own.sites, np.sign(own.table) * np.abs(own.table) ** exponent) for own in error.factors)
    return Sum(error.constant, tuple(powers)).weighted(weights)
