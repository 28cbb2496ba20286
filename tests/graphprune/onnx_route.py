"""The same plan by two routes: on a torch module, and on the ONNX file that it was exported to."""

from pathlib import Path

import onnx
import torch
from torch import nn

import graphprune as gp
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import StepError
from graphprune.graph import ModelGraph, Site
from graphprune.plan import Choice, Plan
from tests.graphprune.oracle import outputs_of, relative_error

PATTERNS = {"channels": "filter", "heads": "heads", "hidden": "hidden", "width": "width"}


def moved(plan: Plan, graph: ModelGraph, other: ModelGraph) -> Plan:
    """The plan of one graph for another graph of the same network: a site is known by its size and its layers.

    Raises StepError where the other graph lacks a site.
    """
    places: dict[object, list[Site]] = {}
    for site in other.all_sites:
        places.setdefault(_place(other, site), []).append(site)
    choices = []
    for choice in plan.choices:
        site = graph.site[choice.site]
        found = places.get(_place(graph, site), [])
        same = [there for there in found if there.kind == site.kind] or found
        if not same:
            raise StepError(f"the other graph has no site like {site.name!r} ({site.kind}, {site.size} units)")
        found.remove(same[0])
        pattern = choice.pattern if same[0].kind == site.kind else PATTERNS[same[0].kind]
        choices.append(Choice(same[0].name, pattern, choice.level, choice.keep))
    return Plan(other.signature, tuple(choices), other.inputs)


def _place(graph: ModelGraph, site: Site) -> object:
    position = {layer.node: number for number, layer in enumerate(graph.layers)}
    return site.size, site.kind == "kernel", tuple(sorted(position[node] for node in site.layers))


def difference(model: nn.Module, graph: ModelGraph, plan: Plan, file: Path, batch: int = 3) -> float:
    """How far the file, cut by the same plan, is from the cut module: a share of the largest output at this batch."""
    other = gp.trace(file)
    cut = gp.apply(file, moved(plan, graph, other), other)
    onnx.checker.check_model(cut)
    inputs = [torch.randn(batch, *shape).to(getattr(torch, dtype)) for dtype, shape in graph.inputs]
    names = [value.name for value in cut.graph.input]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    found = [torch.from_numpy(x) for x in OnnxRuntimeEngine().run(cut.SerializeToString(), feeds)]
    return relative_error(found, outputs_of(gp.apply(model, plan, graph), inputs))
