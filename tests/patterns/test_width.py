"""Embedding widths: which groups are one, the levels, and that norms run over the kept part."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from graphprune.coupling.graph import ModelGraph, Site
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import resolve
from graphprune.cutting.surgery import operate, perform
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.onnx_files.export import onnx_bytes
from graphprune.patterns.width import Width
from graphprune.plan import Choice, Plan
from tests.graphprune.networks import Attention, Mixer, SwiGlu, Tensors, images, timm_model, tokens
from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble

VIT = timm_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=4)
SWIN = timm_model(
    "swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(2, 1), num_heads=(2, 4), window_size=4
)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensors]] = {
    "vit": (VIT, images(32)),
    "swin": (SWIN, images(32)),
    "convnext": (timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), images(32)),
    "mixer": (Mixer, tokens()),
    "attention": (lambda: Attention(True, False), tokens()),
    "swiglu": (lambda: SwiGlu(packed=True), tokens()),
}
WIDTHS = {"vit": [192], "swin": [24, 48], "convnext": [8, 16, 24, 32], "mixer": [12], "attention": [12], "swiglu": [12]}


def traced(name: str, dtype: torch.dtype) -> tuple[nn.Module, ModelGraph, list[torch.Tensor]]:
    build, inputs = NETS[name]
    torch.manual_seed(0)
    model, typed = scramble(build(), dtype=dtype), [x.to(dtype) for x in inputs]
    return model, trace(model, typed), typed


def widths(graph: ModelGraph) -> list[Site]:
    return [site for site in graph.all_sites if site.kind == "width"]


def plan_of(graph: ModelGraph, level: int) -> Plan:
    """Every stream at one of its levels, with units from all over it."""
    choices = []
    for site in widths(graph):
        chosen = Width().levels(site, 4)[level]
        keep = Width().choose(site, chosen, np.random.default_rng(site.size).random(site.size))
        choices.append(Choice(site.name, "width", chosen.name, keep))
    return Plan(graph.signature, tuple(choices), graph.inputs)


@pytest.mark.parametrize(
    ("size", "block", "counts"),
    [(192, 16, [144, 96]), (768, 16, [576, 384]), (48, 16, [32]), (32, 16, [16]), (16, 16, [])],
)
def test_three_quarters_and_a_half_in_whole_blocks(size: int, block: int, counts: list[int]) -> None:
    levels = Width().levels(Site("a", "width", size, (), "a", atom=0), block)
    assert [level.count for level in levels] == counts


@pytest.mark.parametrize("name", NETS)
def test_the_streams_are_found_and_the_pruned_network_is_the_masked_one(name: str) -> None:
    model, graph, inputs = traced(name, torch.float64)
    assert [site.size for site in widths(graph)] == WIDTHS[name]
    plan = plan_of(graph, -1)
    operation = operate(model, graph, plan)
    expected = masked_outputs(graph, plan, model, inputs)
    assert operation.own_class
    assert relative_error(outputs_of(operation.model, inputs), expected) < 1e-10
    assert relative_error(expected, outputs_of(model, inputs)) > 1e-3


@pytest.mark.parametrize("name", ["vit", "swin", "mixer"])
def test_the_exported_network_agrees(name: str) -> None:
    model, graph, inputs = traced(name, torch.float32)
    plan = plan_of(graph, 0)
    exported = onnx_bytes(operate(model, graph, plan).model, inputs)
    feed = {onnx.load_from_string(exported).graph.input[0].name: inputs[0].numpy()}
    found = [torch.from_numpy(x) for x in OnnxRuntimeEngine().run(exported, feed)]
    assert relative_error(found, masked_outputs(graph, plan, model, inputs)) < 1e-4


def test_everything_on_the_stream_follows_by_hand() -> None:
    model, graph, (x,) = traced("swiglu", torch.float64)
    (site,) = widths(graph)
    keep = [0, 3, 4, 7, 9, 10]
    pruned = perform(model, graph, Width().rewrite(site, tuple(keep))).model
    with torch.no_grad():
        stream = functional.linear(x, model.stem.weight[keep], model.stem.bias[keep])
        normed = functional.rms_norm(stream, (6,), model.norm.weight[keep], model.norm.eps)
        value, gate = functional.linear(normed, model.up.weight[:, keep], model.up.bias).chunk(2, -1)
        out = stream + functional.linear(value * functional.silu(gate), model.down.weight[keep], model.down.bias[keep])
        expected = functional.linear(out, model.head.weight[:, keep], model.head.bias)
        assert torch.allclose(pruned(x), expected, rtol=0, atol=1e-12)


def test_a_vision_transformer_is_narrower_everywhere() -> None:
    model, graph, _ = traced("vit", torch.float32)
    pruned = operate(model, graph, plan_of(graph, -1)).model
    state = pruned.state_dict()
    assert (state["pos_embed"].shape[-1], state["cls_token"].shape[-1]) == (96, 96)
    assert state["blocks.1.attn.qkv.weight"].shape == (3 * 192, 96)
    assert state["head.weight"].shape == (7, 96)
    assert pruned.norm.normalized_shape == (96,)


def test_what_is_no_stream_is_of_another_kind() -> None:
    """Head counts and head widths of an attention that is not fused, axes of parameters, outputs of the model."""
    graph = trace(Attention(fused_weights=True, fused_product=False), tokens())
    kinds = [(group.name.partition("#")[0], group.size, group.kind) for group in graph.all_groups]
    assert [kind for kind in kinds if kind[2] == "width"] == [("stem", 12, "width")]
    assert {("weights.qkv", 3, "other"), ("weights.qkv", 4, "head-width"), ("head", 5, "other")} <= set(kinds)
    vit = trace(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32), images(32))
    assert [group.size for group in vit.all_groups if group.kind == "width"] == [192]


def test_a_plan_may_keep_any_units() -> None:
    _, graph, _ = traced("mixer", torch.float32)
    (site,) = widths(graph)
    plan = Plan(graph.signature, (Choice(site.name, "width", "", (1, 5)),), graph.inputs)
    assert resolve(graph, plan).keep[site.atom].tolist() == [1, 5]
