"""Who chooses: one module per agent, listed by name here. Modules are imported only when an agent is asked for."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

from graphprune.agents.base import Agent
from graphprune.errors import InputError

AGENTS = {
    "amc": "graphprune.agents.amc:Amc",
    "autosculpt": "graphprune.agents.autosculpt:AutoSculpt",
    "bo": "graphprune.agents.bocr:BayesianOptimisation",
    "bocr": "graphprune.agents.bocr:BOCR",
    "bocr-gradual": "graphprune.agents.bocr:GradualBOCR",
    "dp": "graphprune.agents.dp:DynamicProgramming",
    "dp+local": "graphprune.agents.dp_local:DynamicProgrammingLocal",
    "gnn_rl": "graphprune.agents.gnn_rl:GNNRL",
    "magnitude": "graphprune.agents.magnitude:Magnitude",
    "nsga2": "graphprune.agents.nsga2:NSGA2",
    "random": "graphprune.agents.random_search:RandomSearch",
    "resource_aware": "graphprune.agents.resource_aware:ResourceAware",
    "sparrl": "graphprune.agents.sparrl:SparRL",
    "tpe": "graphprune.agents.tpe:TPE",
    "uniform": "graphprune.agents.uniform:Uniform",
}
"""Name -> "module:class"."""
ENTRY_POINTS = "graphprune.agents"
"""Packages add agents of their own under this entry-point group."""


def create(name: str, **settings: Any) -> Agent:
    """A new agent; `settings` are arguments of its constructor.

    Raises InputError for a name that is neither listed here nor among the entry points, and for settings that the agent
    does not have.
    """
    kind = _constructor(name)
    if unknown := settings.keys() - signature(kind).parameters.keys():
        raise InputError(f"the agent {name!r} has no setting {', '.join(sorted(unknown))}")
    return kind(**settings)


def _constructor(name: str) -> Callable[..., Agent]:
    if name in AGENTS:
        module, _, attribute = AGENTS[name].partition(":")
        own: Callable[..., Agent] = getattr(import_module(module), attribute)
        return own
    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in others:
        raise InputError(f"unknown agent {name!r}; known: {', '.join(sorted({*AGENTS, *others}))}")
    added: Callable[..., Agent] = others[name].load()
    return added
