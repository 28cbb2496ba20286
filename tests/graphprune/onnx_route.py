"""The same plan by two routes: on a torch module, and on the ONNX file that it was exported to."""

from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path

import onnx
import torch
from torch import nn

import graphprune as gp
from graphprune.coupling.graph import ModelGraph, Site
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import StepError
from graphprune.plan import Choice, Plan
from tests.graphprune.oracle import outputs_of, relative_error

PATTERNS = {"channels": "filter", "heads": "heads", "hidden": "hidden", "width": "width"}


def moved(plan: Plan, graph: ModelGraph, other: ModelGraph) -> Plan:
    """The plan of one graph for another graph of the same network: a site is known by its size and its layers.

    Layers are known by their order, operator by operator: what stands in the torch module as a product with a parameter
    may be a linear layer in the file. Raises StepError where the other graph lacks a site.
    """
    ours, theirs = [layer.operator for layer in graph.layers], [layer.operator for layer in other.layers]
    aligned = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    pairs = [(block.a + n, block.b + n) for block in aligned for n in range(block.size)]
    same_layer = {other.layers[b].node: graph.layers[a].node for a, b in pairs}
    known = {node: node for node in same_layer.values()}
    places: dict[object, list[Site]] = {}
    for site in other.all_sites:
        places.setdefault(_place(site, same_layer), []).append(site)
    choices = []
    for choice in plan.choices:
        site = graph.site[choice.site]
        found = places.get(_place(site, known), [])
        same = [there for there in found if there.kind == site.kind] or found
        if not same:
            raise StepError(f"the other graph has no site like {site.name!r} ({site.kind}, {site.size} units)")
        found.remove(same[0])
        pattern = choice.pattern if same[0].kind == site.kind else PATTERNS[same[0].kind]
        choices.append(Choice(same[0].name, pattern, choice.level, choice.keep))
    return Plan(other.signature, tuple(choices), other.inputs)


def _place(site: Site, names: Mapping[str, str]) -> object:
    return site.size, site.kind == "kernel", frozenset(names[node] for node in site.layers if node in names)


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
