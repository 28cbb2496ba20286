"""Dropped branches: where they are, what is left of them, and that whatever else is cut inside does not matter."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphprune import checkpoint, models
from graphprune.counting import count
from graphprune.coupling.branches import outermost
from graphprune.coupling.graph import ModelGraph, Site
from graphprune.coupling.operators import Absent
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts, join, resolve
from graphprune.cutting.exported import cut_program, literal_changes
from graphprune.cutting.surgery import Operation, operate, perform
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.onnx_files import exporters
from graphprune.onnx_files.export import export_onnx, onnx_bytes
from graphprune.plan import Choice, Plan
from graphprune.record import Record
from graphprune.repairing.calibration import calibrate
from graphprune.repairing.repair import make_reference, repair
from graphprune.reporting.drawing import PlanLabels, draw
from graphprune.result import Result
from graphprune.searching import candidates as tables
from graphprune.searching.candidates import Candidates
from graphprune.searching.evaluation import Workbench
from graphprune.target import Target
from graphprune.timing.profile import MOST_GAIN
from graphprune.uniform import uniform_plan
from tests.graphprune import tiny
from tests.graphprune.networks import NETWORKS, Attention, Mixer, SwiGlu, Tensors, conv_bn, images, timm_model, tokens
from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble


class SqueezedBlock(nn.Module):
    """A bottleneck with squeeze-and-excitation, a scale per channel and a ReLU in place behind the sum."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one, self.two = conv_bn(width, 8, 1), nn.Sequential(*conv_bn(8, width)[:2])
        self.reduce, self.gate = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        y = y * torch.sigmoid(self.gate(functional.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return functional.relu_(x + y)


def squeezed() -> nn.Module:
    """Two such blocks between a stem and a classifier."""
    layers = [conv_bn(3, 16), SqueezedBlock(), SqueezedBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 5))


class Shared(nn.Module):
    """What looks like a branch and is none: read twice, fed from elsewhere, changing its skip, or without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.other, self.late = (nn.Conv2d(3 if n == 0 else 8, 8, 1) for n in range(4))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.twice(x)
        z = x + y
        z = z + self.other(y)
        z = z + torch.tanh(z)
        return self.head(z + self.late(functional.relu_(z.flatten(2)).reshape(z.shape)))


VIT = timm_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8, embed_dim=48, init_values=0.1)
SWIN = timm_model(
    "swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(2, 1), num_heads=(2, 4), window_size=4
)
STAGE = timm_model("resnet18", channels=(16, 16, 32, 32), layers=(3, 1, 1, 1), stem_width=16)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensors]] = {
    "vit": (VIT, images(32)),
    "swin": (SWIN, images(32)),
    "stage": (STAGE, images(32)),
    "convnext": (timm_model("convnext_tiny", depths=(1, 2, 1, 1), dims=(8, 16, 24, 32)), images(32)),
    "squeezed": (squeezed, images()),
    "mixer": (Mixer, tokens()),
    "swiglu": (lambda: SwiGlu(packed=True), tokens()),
    "attention": (lambda: Attention(True, False), tokens()),
    "option_a": NETWORKS["option_a"],
}
BRANCHES = {
    "vit": ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"],
    "swin": [f"layers.{i}.{name}" for i in ("0.blocks.0", "0.blocks.1", "1.blocks.0") for name in ("attn", "mlp")],
    "stage": ["layer1.1", "layer1.2"],  # the first block of each stage changes the shape
    "convnext": [f"stages.{place}" for place in ("0.blocks.0", "1.blocks.0", "1.blocks.1", "2.blocks.0", "3.blocks.0")],
    "squeezed": ["1", "2"],
    "mixer": ["token", "channel"],
    "swiglu": ["up"],
    "attention": ["weights.qkv"],
    "option_a": ["one.0"],
}
Built = tuple[nn.Module, ModelGraph, list[Tensor]]


@cache
def built(name: str, dtype: torch.dtype = torch.float64) -> Built:
    build, inputs = NETS[name]
    torch.manual_seed(0)
    model, typed = scramble(build(), dtype=dtype), [x.to(dtype) for x in inputs]
    return model, trace(model, typed), typed


def branch_sites(graph: ModelGraph) -> list[Site]:
    return [site for site in graph.all_sites if site.branch is not None]


def removing(graph: ModelGraph, *sites: Site, others: tuple[Choice, ...] = ()) -> Plan:
    choices = (Choice(site.name, "block", "removed", ()) for site in sites)
    return Plan(graph.signature, (*choices, *others), graph.inputs)


def checked(net: Built, plan: Plan) -> Operation:
    """The pruned network, which must be the masked one, and not the dense one."""
    model, graph, inputs = net
    operation = operate(model, graph, plan)
    expected = masked_outputs(graph, plan, model, inputs)
    program = cut_program(graph, resolve(graph, plan), model)
    for pruned in (operation.model, program):
        assert relative_error(outputs_of(pruned, inputs), expected) < 1e-10, plan
    assert relative_error(expected, outputs_of(model, inputs)) > 1e-4
    return operation


def operators(model: nn.Module, inputs: list[Tensor]) -> Counter[str]:
    """What torch's older exporter makes, also of an exported graph."""
    converted = exporters.convert(exporters.prepare(model, inputs, True, None), (exporters.by_torchscript,))
    return Counter(node.op_type for node in converted.graph)


# --- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_the_branches_of_a_network(name: str) -> None:
    _, graph, _ = built(name)
    found = [site.name.removesuffix("/block") for site in branch_sites(graph)]
    assert found == BRANCHES[name]


def test_what_only_looks_like_a_branch() -> None:
    graph = trace(Shared(), images())
    assert graph.branches == ()


def test_a_site_names_the_layers_that_go() -> None:
    _, graph, _ = built("vit")
    site = branch_sites(graph)[0]
    assert [graph.layer[node].module for node in site.layers] == [
        "blocks.0.attn.qkv", "blocks.0.attn", "blocks.0.attn.proj",
    ]  # fmt: skip
    assert (site.kind, site.size, site.node) == ("block", 1, site.layers[0])


# --- surgery --------------------------------------------------------------------------------------------------------

OWN = {"vit", "swin", "stage", "convnext", "squeezed", "mixer", "option_a"}
"""The others compute in their own code, between the layers of a branch, what zeros of another shape do not fit."""


@pytest.mark.parametrize("name", NETS)
def test_each_branch_and_all_of_them_dropped(name: str) -> None:
    net = _, graph, _ = built(name)
    sites = branch_sites(graph)
    for some in ([sites[0]], [sites[-1]], sites):
        operation = checked(net, removing(graph, *some))
        assert operation.own_class is (name in OWN)
        state = operation.model.state_dict()
        inner = {graph.layer[node].weight for site in some for node in site.layers} - {""}
        assert inner
        assert not inner & state.keys()
        modules = tuple(f"{path}." for site in some if site.branch for path in site.branch.modules)
        assert not [key for key in state if key.startswith(modules)]


def test_scales_and_norms_of_a_branch_are_gone_too() -> None:
    for name, held in (("squeezed", "1.gamma"), ("convnext", "stages.0.blocks.0.gamma"), ("vit", "blocks.0.ls1.gamma")):
        model, graph, _ = built(name)
        plan = removing(graph, branch_sites(graph)[0])
        assert held in model.state_dict()
        for pruned in (operate(model, graph, plan).model, cut_program(graph, resolve(graph, plan), model)):
            assert held not in pruned.state_dict()
    assert "blocks.0.norm1.weight" not in pruned.state_dict()
    assert "blocks.0.norm2.weight" in pruned.state_dict()


def test_attention_and_mlp_of_one_block_dropped_leave_what_came_in() -> None:
    model, graph, (x,) = built("vit")
    pruned = checked(built("vit"), removing(graph, *branch_sites(graph)[:2])).model
    inside = torch.randn(2, 17, 48, dtype=torch.float64)
    assert torch.equal(pruned.blocks[0](inside), inside)
    assert not torch.equal(model.blocks[0](inside), inside)
    assert pruned(x).shape == (2, 7)


def test_dropping_wins_over_what_else_is_cut_inside() -> None:
    _, graph, _ = built("vit")
    attention, mlp = branch_sites(graph)[:2]
    heads = Choice("blocks.0.attn/heads", "heads", "1 of 3", (1,))
    hidden = Choice("blocks.0.mlp.fc1/hidden", "hidden", "64 of 192", tuple(range(64)))
    width = next(site for site in graph.all_sites if site.kind == "width")
    narrow = Choice(width.name, "width", "24 of 48", tuple(range(0, 48, 2)))
    for others in ((heads,), (hidden,), (heads, hidden, narrow)):
        both = checked(built("vit"), removing(graph, attention, mlp, others=others)).model
        assert count(both, built("vit")[2]).flops < count(built("vit")[0], built("vit")[2]).flops
    assert not list(literal_changes(graph, resolve(graph, removing(graph, attention, others=(heads,)))))
    assert list(literal_changes(graph, resolve(graph, removing(graph, mlp, others=(heads,)))))
    _, graph, _ = built("squeezed")
    site = branch_sites(graph)[0]
    kernel = Choice("1.two.0/kernel", "kernel", "3x1", (1, 4, 7))
    inner = Choice("1.one.0/channels", "filter", "4 of 8", (0, 1, 4, 6))
    for others in ((kernel,), (inner,), (kernel, inner)):
        checked(built("squeezed"), removing(graph, site, others=others))
        cuts = resolve(graph, removing(graph, site, others=others))
        assert all(cuts.operator(graph.layer[node]) == Absent() for node in site.layers)


def test_a_stream_that_is_read_again_is_not_written_to() -> None:
    """The sum was a tensor of its own; a ReLU in place behind it must not change what the skip's other readers see."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = functional.relu_(x + self.inner(x))
            return self.head(y - x)

    model = scramble(Twice())
    inputs = [x.double() for x in tokens()]
    graph = trace(model, inputs)
    checked((model, graph, inputs), removing(graph, *branch_sites(graph)))


def test_a_branch_within_a_branch() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.three(x + self.two(x))

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Linear(12, 12), Inner(), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.inner(x))

    model = scramble(Nested())
    inputs = [x.double() for x in tokens()]
    graph = trace(model, inputs)
    sites = branch_sites(graph)
    assert [site.branch.modules for site in sites if site.branch] == [("inner",), ("inner.two",)]
    for some in ([sites[0]], [sites[1]], sites, sites[::-1]):
        assert checked((model, graph, inputs), removing(graph, *some)).own_class
    assert len(outermost(graph.branches)) == 1


def test_a_probe_finds_the_attributes_of_branches_that_may_go() -> None:
    """With every branch gone nothing would show that `num_heads` has to follow a cut of heads."""
    model, graph, inputs = built("vit", torch.float32)
    heads = Choice("blocks.0.attn/heads", "heads", "1 of 3", (1,))
    cuts = resolve(graph, removing(graph, *branch_sites(graph), others=(heads,)))
    bench = Workbench(model, graph, make_reference(graph, inputs), tiny.task())
    bench.probe(cuts)
    assert bench.route.own_class
    assert "num_heads" in [attribute for _, attribute in bench.route.attributes]
    assert type(bench.build(cuts)) is type(model)


def test_the_unit_kept_is_no_cut_and_an_empty_keep_needs_a_branch() -> None:
    _, graph, _ = built("vit")
    site = branch_sites(graph)[0]
    whole = Plan(graph.signature, (Choice(site.name, "block", "all", (0,)),), graph.inputs)
    assert resolve(graph, whole) == Cuts()
    assert resolve(graph, removing(graph, site)).dropped == (site.branch,)
    assert Plan.from_json(removing(graph, site).to_json()) == removing(graph, site)


# --- export and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "swin", "stage", "convnext", "squeezed", "mixer"])
def test_the_exported_file_does_not_pay_for_zeros(name: str, tmp_path: Path) -> None:
    """The user's own class, with zeros in it, becomes the graph that has none, by both exporters."""
    model, graph, inputs = built(name, torch.float32)
    plan = removing(graph, *branch_sites(graph))
    operation = operate(model, graph, plan)
    assert operation.own_class
    bare = operators(cut_program(graph, resolve(graph, plan), model), inputs)
    found = operators(operation.model, inputs)
    assert found["Add"] == bare["Add"]
    assert not found["ConstantOfShape"] + found["Expand"] - bare["ConstantOfShape"] - bare["Expand"]
    feed = {onnx.load_from_string(onnx_bytes(operation.model, inputs)).graph.input[0].name: inputs[0].numpy()}
    outputs = [torch.from_numpy(x) for x in OnnxRuntimeEngine().run(onnx_bytes(operation.model, inputs), feed)]
    assert relative_error(outputs, masked_outputs(graph, plan, model, inputs)) < 1e-4
    if name in ("vit", "mixer"):
        file = export_onnx(operation.model, tmp_path / "model.onnx", inputs)
        kinds = Counter(node.op_type for node in onnx.load(file).graph.node)
        dense = Counter(node.op_type for node in onnx.load(export_onnx(model, tmp_path / "d.onnx", inputs)).graph.node)
        assert kinds["ConstantOfShape"] + kinds["Expand"] <= dense["ConstantOfShape"] + dense["Expand"]
        assert dense["Add"] - kinds["Add"] >= len(branch_sites(graph))


@pytest.mark.parametrize("dynamic", [True, False])
def test_another_zero_constant_does_not_bring_the_branch_back(dynamic: bool, tmp_path: Path) -> None:
    """The shortcuts pad with 0.0; exporters store constants that are equal once, and -0.0 equals 0.0."""
    model = scramble(models.create("cifar:resnet20"), dtype=torch.float32)
    inputs = [torch.randn(2, 3, 32, 32)]
    graph = trace(model, inputs)
    sites = branch_sites(graph)
    pruned = operate(model, graph, removing(graph, *sites)).model
    kinds = []
    for module, file in ((model, "dense.onnx"), (pruned, "pruned.onnx")):
        path = export_onnx(module, tmp_path / file, inputs, dynamic)
        kinds.append(Counter(node.op_type for node in onnx.load(path).graph.node))
    dense, left = kinds
    assert dense["Add"] - left["Add"] == dense["Relu"] - left["Relu"] == len(sites) > 3
    assert dense["Conv"] - left["Conv"] == 2 * len(sites)
    assert not {"Neg", "Expand", "ConstantOfShape"} & left.keys() - dense.keys()


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    model, graph, inputs = built("vit", torch.float32)
    plan = removing(graph, *branch_sites(graph)[1:3])
    pruned = operate(model, graph, plan).model
    record = Record(plan, 0.5)
    result = Result(pruned, model, graph, plan, record, record, Target(latency=0.5))
    checkpoint.save(result, tmp_path)
    loaded = checkpoint.load(tmp_path, copy.deepcopy(model))
    assert list(loaded.state_dict()) == list(pruned.state_dict())
    assert torch.equal(loaded(inputs[0]), pruned(inputs[0]))


# --- repair, scores and tables --------------------------------------------------------------------------------------


def pictures(graph: ModelGraph) -> Tensor:
    return torch.randn(24, *graph.inputs[0][1], generator=torch.Generator().manual_seed(2))


def test_repair_solves_the_layers_behind_a_dropped_branch_and_leaves_those_before_it() -> None:
    model, graph, _ = built("vit", torch.float32)
    x = pictures(graph)
    cuts = Cuts(dropped=tuple(site.branch for site in branch_sites(graph)[1:2] if site.branch))
    pruned = perform(model, graph, cuts).model
    plain = copy.deepcopy(pruned)
    repair(pruned, model, graph, cuts, make_reference(graph, [x]))
    before, after = model.state_dict(), pruned.state_dict()
    assert torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])
    assert not torch.equal(before["blocks.1.attn.qkv.weight"], after["blocks.1.attn.qkv.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    with torch.no_grad():
        expected = model(x)
        assert (pruned(x) - expected).norm() < (plain(x) - expected).norm()


def test_the_energy_of_a_branch_by_hand() -> None:
    model, graph, _ = built("vit", torch.float32)
    x = pictures(graph)
    statistics = calibrate(graph, [x[:10], x[10:]])
    block, seen = model.blocks[0], []
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        handle.remove()
        branch = block.ls1(block.attn(block.norm1(seen[0]))).double()
        expected = branch.square().sum() / (seen[0] + branch).square().sum()
    site = branch_sites(graph)[0]
    assert site.branch is not None
    assert statistics.branches[site.branch.node] == pytest.approx(float(expected), rel=1e-5)
    assert statistics.branches.keys() == {branch.node for branch in graph.branches}


def made(limit: int | None = None, monkeypatch: pytest.MonkeyPatch | None = None) -> Candidates:
    _, graph, _ = built("vit", torch.float32)
    if limit is not None and monkeypatch is not None:
        monkeypatch.setattr(tables, "LARGEST_TABLE", limit)
    return tiny.candidates(graph, calibrate(graph, [pictures(graph)]))


@pytest.mark.parametrize("limit", [1024, 1])
def test_tables_know_that_what_is_dropped_has_no_other_error_and_no_cost(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(limit, monkeypatch)
    model, graph, inputs = built("vit", torch.float32)
    number = {site.name: n for n, site in enumerate(found.sites)}
    attention, heads = number["blocks.0.attn/block"], number["blocks.0.attn/heads"]
    error = found.error()
    flops = found.cost(lambda operator: operator.flops, count(model, inputs).flops)
    dense = [0] * len(found.sites)

    def choose(**options: int) -> list[int]:
        chosen = {{"attention": attention, "heads": heads}[name]: option for name, option in options.items()}
        return [chosen.get(n, 0) for n in range(len(dense))]

    share = found.statistics.branches[found.sites[attention].branch.node]  # type: ignore[union-attr]
    assert error(dense) == pytest.approx(0, abs=1e-9)
    assert error(choose(attention=1)) == pytest.approx(share)
    assert error(choose(attention=1, heads=2)) == pytest.approx(share)
    assert error(choose(heads=2)) > error(choose(heads=1)) > 0
    gone = sum(graph.layer[node].operator.flops for node in found.sites[attention].layers)
    for options in ({"attention": 1}, {"attention": 1, "heads": 2}):
        saved = (1 - flops(choose(**options))) * count(model, inputs).flops
        assert saved == pytest.approx(gone)
    assert flops(choose(heads=2)) < 1


def test_decisions_are_finite_and_a_branch_comes_before_what_is_inside_it() -> None:
    found = made()
    decisions = found.decisions(found.error(), {node.name: n for n, node in enumerate(found.graph.nodes)})
    names = [decision.site for decision in decisions]
    assert names.index("blocks.0.attn/block") < names.index("blocks.0.attn/heads")
    inside = {x.site: [names[n] for n in x.gone_with] for x in decisions if x.gone_with}
    assert inside == {
        "blocks.0.attn/heads": ["blocks.0.attn/block"],
        "blocks.0.mlp.fc1/hidden": ["blocks.0.mlp/block"],
        "blocks.1.attn/heads": ["blocks.1.attn/block"],
        "blocks.1.mlp.fc1/hidden": ["blocks.1.mlp/block"],
    }
    for decision in decisions:
        for option in decision.options:
            assert np.isfinite([option.gain, option.error, option.kept_share]).all()
            assert (option.gain == MOST_GAIN) == (option.pattern == "block")


def test_uniform_plans_leave_branches_and_widths_alone() -> None:
    _, graph, _ = built("vit")
    assert {choice.pattern for choice in uniform_plan(graph, 0.5, 16).choices} == {"heads", "hidden"}


def test_people_see_what_is_dropped() -> None:
    _, graph, _ = built("squeezed")
    plan = removing(graph, branch_sites(graph)[0])
    boxes = [box for box in draw(graph, PlanLabels(graph, plan)).boxes if box.patterns == ("block",)]
    assert len(boxes) == len(branch_sites(graph)[0].layers)
    assert all("becomes nothing; block removed" in box.title for box in boxes)
    table = str(graph.sites())
    assert "1/block" in table
    assert "removed" in table


def test_several_cuts_join() -> None:
    _, graph, _ = built("vit")
    one, two = (Cuts(dropped=(branch,)) for branch in graph.branches[:2])
    assert join(one, two, one).dropped == graph.branches[:2]
    assert replace(one, dropped=()) == Cuts()
