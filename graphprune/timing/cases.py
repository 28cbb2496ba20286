"""What may be tried at the sites of a model: every level of every pattern, and the operators that it exchanges."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from graphprune.coupling.graph import Layer, ModelGraph, Site
from graphprune.coupling.operators import Operator
from graphprune.cutting.cuts import Cuts
from graphprune.pattern import Level, Pattern
from graphprune.timing.profile import Profile


@dataclass(frozen=True)
class Case:
    """A level of a pattern at a site. Which units stay does not matter to the time, so that the first ones do here."""

    site: Site
    pattern: Pattern
    level: Level
    layers: tuple[Layer, ...]
    cuts: Cuts

    @property
    def dense(self) -> tuple[Operator, ...]:
        """The operators of the site's layers as they are."""
        return tuple(layer.operator for layer in self.layers)

    @property
    def cut(self) -> tuple[Operator, ...]:
        """What they become."""
        return tuple(self.cuts.operator(layer) for layer in self.layers)


def cases(graph: ModelGraph, patterns: Sequence[Pattern], block: int) -> Iterator[Case]:
    """Every level that the structure allows, legal or not, in the order of the graph and of the patterns."""
    for site in graph.all_sites:
        layers = tuple(graph.layer[node] for node in site.layers)
        for pattern in patterns:
            for level in pattern.levels(site, block) if site.kind in pattern.kinds else ():
                cuts = pattern.rewrite(site, pattern.sample(site, level))
                yield Case(site, pattern, level, layers, cuts)


def legal_cases(found: Iterable[Case], graph: ModelGraph, profile: Profile) -> Iterator[Case]:
    """Those of the cases that their patterns offer on this engine."""
    legal: dict[tuple[str, str], tuple[Level, ...]] = {}
    for case in found:
        key = (case.site.name, case.pattern.name)
        if key not in legal:
            legal[key] = case.pattern.legal(graph, case.site, profile)
        if case.level in legal[key]:
            yield case


def operators(graph: ModelGraph, patterns: Sequence[Pattern], block: int) -> list[Operator]:
    """All that has to be timed to know what each case gains: every layer dense, and what every case makes of it."""
    found = [layer.operator for layer in graph.layers]
    for case in cases(graph, patterns, block):
        found += case.cut
    return list(dict.fromkeys(found))
