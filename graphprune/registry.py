"""The only place that looks up patterns and agents by name; everything else takes them as given."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from graphprune.engines.base import Engine
from graphprune.errors import InputError
from graphprune.pattern import Pattern

if TYPE_CHECKING:
    from graphprune.agents.base import Agent


@cache
def patterns() -> dict[str, Pattern]:
    """All patterns by name: graphprune's own, and those of the entry-point group `graphprune.patterns`."""
    from graphprune.patterns import PATTERNS

    own = {name: pattern() for name, pattern in PATTERNS.items()}
    return own | {point.name: point.load()() for point in entry_points(group="graphprune.patterns")}


def pattern(name: str) -> Pattern:
    """A pattern by name. Raises InputError for an unknown one."""
    if name not in patterns():
        raise InputError(f"unknown pattern {name!r}; known are {', '.join(sorted(patterns()))}")
    return patterns()[name]


def chosen_patterns(names: Sequence[str] | None, engine: Engine | None = None) -> tuple[Pattern, ...]:
    """The patterns of these names, in the registry's order; for None all that may gain something on the engine.

    InputError for an unknown or no name, and for that of a pattern which gains nothing there. None is any engine.
    """
    if names is None:
        return tuple(known for known in patterns().values() if not known.refusal(engine))
    if not names:
        raise InputError(f"no pattern is chosen; known are {', '.join(sorted(patterns()))}")
    for name in names:
        if reason := pattern(name).refusal(engine):
            where = f" on {engine.identity}" if engine else ""
            raise InputError(f"the pattern {name!r} cannot be used{where}: {reason}")
    return tuple(known for name, known in patterns().items() if name in names)


def agent(name: str, **settings: Any) -> "Agent":
    """A new agent by name. Raises InputError for an unknown one, and for settings that it does not have."""
    from graphprune.agents import create

    return create(name, **settings)
