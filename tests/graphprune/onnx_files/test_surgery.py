"""Surgery on the dense ONNX graph against the two other routes: the cut module, and the file exported from it."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

from graphprune.coupling.graph import ModelGraph, Parameter
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts, resolve
from graphprune.cutting.exported import cut_program
from graphprune.cutting.surgery import example_inputs, perform
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import StepError
from graphprune.onnx_files import surgery as onnx_surgery
from graphprune.onnx_files import template as onnx_template
from graphprune.onnx_files.export import onnx_bytes
from graphprune.onnx_files.surgery import OnnxSurgeon
from graphprune.plan import Plan
from graphprune.registry import patterns
from graphprune.repairing.repair import make_reference, repair
from tests.graphprune.networks import NETWORKS, conv_bn, images
from tests.graphprune.oracle import cuts_of, outputs_of, random_plan, relative_error, scramble

NAMES = (
    "chain",
    "option_a",
    "group_norm",
    "split_concat",
    "channel_shuffle",
    "two_in_two_out",
    "attention_flat",
    "vit_tiny",
)
SHAPES = {"Reshape", "Flatten"}
"""The same to an engine."""
CONSTANTS = ("Constant", "Identity")
"""What the exporter writes beside operators."""


@dataclass(frozen=True)
class Patient:
    """A scrambled network with its graph and surgeon."""

    model: nn.Module
    graph: ModelGraph
    surgeon: OnnxSurgeon

    def difference(self, data: bytes, cut: nn.Module, batch: int) -> float:
        """How far the file is from the module on random inputs: a share of the largest output."""
        inputs = example_inputs(self.graph.inputs, batch)
        names = [value.name for value in onnx.load_from_string(data).graph.input]
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        found = [torch.from_numpy(x) for x in OnnxRuntimeEngine().run(data, feeds)]
        return relative_error(found, outputs_of(cut, inputs))

    def random(self, seed: int) -> Cuts:
        """Random cuts at most sites."""
        return cuts_of(self.graph, random_plan(self.graph, np.random.default_rng(seed)))

    def bytes_of_template(self) -> bytes:
        """All that the surgeon holds of the dense network."""
        data: bytes = ir.to_proto(self.surgeon.template.model).SerializeToString(deterministic=True)
        return data


def admitted(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Patient:
    """A network made ready."""
    graph = trace(scramble(model, dtype=torch.float32), inputs)
    return Patient(model, graph, OnnxSurgeon(graph))


@cache
def patient(name: str) -> Patient:
    """A network of the tests."""
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    return admitted(build(), inputs)


def operators(data: bytes) -> Counter[str]:
    """The operators of a file."""
    kinds = (node.op_type for node in onnx.load_from_string(data).graph.node)
    return Counter(kind for kind in kinds if kind not in CONSTANTS)


@pytest.mark.parametrize("name", NAMES)
def test_random_cuts_of_everything(name: str) -> None:
    case = patient(name)
    for seed in range(3):
        cuts = case.random(seed)
        expected = cut_program(case.graph, cuts, case.model)
        for batch in (1, 3):
            assert case.difference(case.surgeon.cut(cuts), expected, batch) < 1e-4
        inputs = example_inputs(case.graph.inputs)
        changed = relative_error(outputs_of(expected, inputs), outputs_of(case.model, inputs))
        assert changed > 1e-3, "this cut changes nothing: the case proves nothing"


@pytest.mark.parametrize("name", ["chain", "vit_tiny"])
def test_branches_that_go_leave_nothing(name: str) -> None:
    case = patient(name)
    cuts = Cuts(dropped=case.graph.branches)
    data = case.surgeon.cut(cuts)
    assert case.difference(data, cut_program(case.graph, cuts, case.model), 3) < 1e-4
    layers = [layer for layer in case.graph.layers if layer.weight and not cuts.drops(layer)]
    assert sum(operators(data)[kind] for kind in ("Conv", "Gemm", "MatMul")) == len(layers) < len(case.graph.layers)


@pytest.mark.parametrize("name", ["chain", "vit_tiny"])
def test_weights_of_a_repaired_module(name: str) -> None:
    case = patient(name)
    reference = make_reference(case.graph, [example_inputs(case.graph.inputs, 16)[0]])
    for seed in range(2):
        cuts = case.random(seed)
        pruned = perform(case.model, case.graph, cuts).model
        sliced = outputs_of(pruned, example_inputs(case.graph.inputs))
        repair(pruned, case.model, case.graph, cuts, reference)
        assert relative_error(outputs_of(pruned, example_inputs(case.graph.inputs)), sliced) > 1e-3
        assert case.difference(case.surgeon.cut(cuts, pruned.state_dict()), pruned, 3) < 1e-4


@pytest.mark.parametrize("name", ["chain", "option_a", "split_concat"])
def test_the_operators_are_those_of_an_export(name: str) -> None:
    """The engine runs both alike."""
    case = patient(name)
    for cuts in (Cuts(), *plans(case)):
        exported = onnx_bytes(perform(case.model, case.graph, cuts).model, example_inputs(case.graph.inputs))
        ours, theirs = operators(case.surgeon.cut(cuts)), operators(exported)
        assert not set(ours - theirs) - SHAPES, cuts
        assert ours["Conv"] == theirs["Conv"] > 0
        assert ours["BatchNormalization"] == theirs["BatchNormalization"] == 0


def plans(case: Patient) -> list[Cuts]:
    """A cut by each pattern that fits somewhere, at its first site and level."""
    found = []
    for pattern in patterns().values():
        sites = (site for site in case.graph.all_sites if site.kind in pattern.kinds and pattern.levels(site, 4))
        for site, _ in zip(sites, range(1), strict=False):
            found.append(pattern.rewrite(site, pattern.sample(site, pattern.levels(site, 4)[0])))
    return found


def test_the_dense_graph_stays_and_equal_cuts_give_equal_bytes() -> None:
    case = patient("chain")
    before = case.bytes_of_template()
    cuts = [*plans(case), case.random(0)]
    assert len(cuts) > 4
    first = [case.surgeon.cut(one) for one in cuts]
    assert len(set(first)) == len(first)
    assert [case.surgeon.cut(one) for one in cuts] == first
    assert case.bytes_of_template() == before


def test_no_cut_is_the_dense_network() -> None:
    case = patient("vit_tiny")
    assert case.difference(case.surgeon.cut(Cuts()), case.model, 2) < 1e-5
    assert case.surgeon.cut(resolve(case.graph, Plan(case.graph.signature))) == case.surgeon.cut(Cuts())


def test_the_state_of_another_cut_is_refused() -> None:
    case = patient("chain")
    one, other = case.random(0), case.random(1)
    state = cut_program(case.graph, other, case.model).state_dict()
    with pytest.raises(StepError, match=r"the state holds '\S+' of shape .*, the cut needs"):
        case.surgeon.cut(one, state)


class Shuffled(nn.Module):
    """A channel shuffle that is one operator, whose sizes torch writes into views of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv_bn(3, 12), nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(functional.channel_shuffle(self.first(x), 3))


def test_sizes_that_cannot_be_found_are_said() -> None:
    case = admitted(Shuffled(), images())
    assert case.difference(case.surgeon.cut(Cuts()), case.model, 3) < 1e-4
    (atom,) = {site.atom for site in case.graph.all_sites if site.kind == "channels" and site.size == 4}
    with pytest.raises(StepError, match="cannot be changed in the ONNX graph"):
        case.surgeon.cut(Cuts({atom: np.arange(2)}))


def test_the_check_finds_what_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    case = patient("split_concat")
    cuts = Cuts({site.atom: np.arange(2) for site in case.graph.all_sites if site.kind == "channels"})
    case.surgeon.check(cuts)
    with monkeypatch.context() as patch:
        patch.setattr(case.surgeon, "template", replace(case.surgeon.template, literals=()))
        with pytest.raises(StepError, match="does not run"):
            case.surgeon.check(cuts)
    original = onnx_surgery._Operation._weight

    def halved(operation: Any, parameter: Parameter, value: ir.Value) -> Any:
        return original(operation, parameter, value) / 2

    monkeypatch.setattr(onnx_surgery._Operation, "_weight", halved)
    with pytest.raises(StepError, match="does not compute what the cut module does"):
        case.surgeon.check(cuts)


def test_a_failed_export_is_a_step_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: object) -> None:
        raise TypeError("no such operator\nand pages of advice")

    monkeypatch.setattr(onnx_template, "translated", broken)
    with pytest.raises(StepError, match=r"cannot be exported for surgery: no such operator$"):
        OnnxSurgeon(patient("chain").graph)
