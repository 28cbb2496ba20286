"""A problem as bytes, without its evaluator: safetensors, the tables beside one JSON text. Nothing is unpickled."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from graphprune.errors import InputError, StepError
from graphprune.record import Record
from graphprune.searching.problem import Choices, Decision, Factor, GraphView, Option, Problem, Sum

FORMAT = 1
FACTS = "facts"
"""The tensor that holds the JSON text: a header would be lost where bytes are read and not a file."""
Arrays = dict[str, NDArray[Any]]


def pack(problem: Problem) -> bytes:
    """The problem as bytes; its evaluator, trials and records are left out."""
    arrays: Arrays = {
        "features": problem.graph.features,
        "edges": problem.graph.edges,
        "edge_types": problem.graph.edge_types,
    }
    facts = {
        "format": FORMAT,
        "model": problem.model,
        "inputs": problem.inputs,
        "limits": dict(problem.limits),
        "decisions": [asdict(decision) for decision in problem.decisions],
        "error": _pack_sum(problem.error, "error", arrays),
        "costs": {name: _pack_sum(cost, f"cost {name}", arrays) for name, cost in problem.costs.items()},
    }
    arrays[FACTS] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    packed: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return packed


def unpack(data: bytes) -> Problem:
    """The problem that was packed. It holds no trials: its evaluator is gone. Raises InputError for other bytes."""
    try:
        arrays = load(data)
        facts = json.loads(arrays[FACTS].tobytes())
        if facts["format"] != FORMAT:
            raise InputError(f"a stored problem has format {facts['format']!r}, this version reads {FORMAT}")
        problem = Problem(
            decisions=tuple(map(_decision, facts["decisions"])),
            graph=GraphView(arrays["features"], arrays["edges"], arrays["edge_types"]),
            costs={name: _unpack_sum(stored, f"cost {name}", arrays) for name, stored in facts["costs"].items()},
            limits={name: float(limit) for name, limit in facts["limits"].items()},
            error=_unpack_sum(facts["error"], "error", arrays),
            evaluator=_gone,
            trials=0,
            model=str(facts["model"]),
            inputs=tuple((dtype, tuple(shape)) for dtype, shape in facts["inputs"]),
        )
        _check(problem)
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"a stored problem cannot be read: {str(error).splitlines()[0]}") from None
    return problem


def _pack_sum(total: Sum, name: str, arrays: Arrays) -> dict[str, Any]:
    """What JSON holds of a sum; its tables go to `arrays`."""
    arrays |= {f"{name} {number}": factor.table for number, factor in enumerate(total.factors)}
    return {"constant": total.constant, "sites": [factor.sites for factor in total.factors]}


def _unpack_sum(stored: Mapping[str, Any], name: str, arrays: Arrays) -> Sum:
    factors = (Factor(tuple(sites), arrays[f"{name} {number}"]) for number, sites in enumerate(stored["sites"]))
    return Sum(float(stored["constant"]), tuple(factors))


def _decision(stored: Mapping[str, Any]) -> Decision:
    options = tuple(Option(**_tuples(option)) for option in stored["options"])
    return Decision(**{**_tuples(stored), "options": options})


def _tuples(stored: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def _check(problem: Problem) -> None:
    """Raises ValueError where tables, sites and nodes do not belong together."""
    sizes: Sequence[int] = [len(decision.options) for decision in problem.decisions]
    for total in (problem.error, *problem.costs.values()):
        for factor in total.factors:
            if factor.table.shape != tuple(sizes[site] for site in factor.sites):
                raise ValueError(f"a table of the sites {factor.sites} has the shape {factor.table.shape}")
    for number, decision in enumerate(problem.decisions):
        if not 0 <= decision.node < len(problem.graph.features) or not decision.options:
            raise ValueError(f"the site {decision.site!r} has no node or no option")
        if any(not 0 <= earlier < number for earlier in decision.gone_with):
            raise ValueError(f"the site {decision.site!r} depends on a later one")
    if not problem.limits or not problem.limits.keys() <= problem.costs.keys():
        raise ValueError("a limit has no cost")


def _gone(choices: Choices) -> Record:
    raise StepError("a stored problem cannot be evaluated")
