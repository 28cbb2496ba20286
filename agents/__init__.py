"""Who chooses: one module per agent, listed by name here. Modules are imported only when an agent is asked for."""

from importlib import import_module
from importlib.metadata import entry_points

from graphprune.agents.base import Agent
from graphprune.errors import InputError

AGENTS = {
    "autosculpt": "graphprune.agents.autosculpt:AutoSculpt",
    "dp": "graphprune.agents.dp:DynamicProgramming",
    "magnitude": "graphprune.agents.magnitude:Magnitude",
    "random": "graphprune.agents.random_search:RandomSearch",
    "uniform": "graphprune.agents.uniform:Uniform",
}
"""Name -> "module:class"."""
ENTRY_POINTS = "graphprune.agents"
"""Packages add agents of their own under this entry-point group."""


def create(name: str) -> Agent:
    """A new agent. Raises InputError for a name that is neither listed here nor among the entry points."""
    if name in AGENTS:
        module, _, attribute = AGENTS[name].partition(":")
        agent: Agent = getattr(import_module(module), attribute)()
        return agent
    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in others:
        raise InputError(f"unknown agent {name!r}; known: {', '.join(sorted({*AGENTS, *others}))}")
    added: Agent = others[name].load()()
    return added
