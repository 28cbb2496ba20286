"""What the stages of the headline table hand to each other."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import zoo
from headline_rows import Candidate, Row, folder_of, rows, store, write_facts
from headline_table import Point, grouped, line, points
from torch import nn

import graphprune as gp
from graphprune.files import tensors
from graphprune.record import Record, Share
from graphprune.result import Result

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def facts(**more: object) -> dict[str, object]:
    own = {"model": "resnet8", "method": "torch-pruning", "speedup": 2.0, "network": "resnet8", "variant": "some"}
    return own | {"validation": 0.5} | more


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def narrow(model: nn.Module) -> nn.Module:
    """A ResNet-8 whose first block has eight inner channels."""
    block = model.layer1[0]
    for layer in (block.conv1, block.bn1, block.conv2):
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            axis = 1 if layer is block.conv2 else 0
            getattr(layer, name).data = value.data.narrow(axis, 0, 8).clone() if value.dim() else value.data
    block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = 8
    return model


def test_a_resized_network_comes_back(tmp_path: Path):
    model = narrow(zoo.build("resnet8"))
    store(tmp_path, model, facts())
    found = Candidate.read(tmp_path).network()
    assert torch.equal(outputs(found), outputs(model))
    assert found.layer1[0].conv1.out_channels == 8


def test_a_plan_comes_back_with_tuned_weights(tmp_path: Path):
    dense = zoo.build("resnet8").eval()
    graph = gp.trace(dense, IMAGES)
    plan = gp.uniform_plan(graph, keep=0.5, align=8)
    pruned, tuned = gp.apply(dense, plan, graph), gp.apply(dense, plan, graph)
    tuned.linear.bias.data += 1
    gp.save(Result(pruned, dense, graph, plan, Record(plan), Record(plan), gp.Target(latency=0.5)), tmp_path)
    write_facts(tmp_path, facts(method="dp"))
    (tmp_path / "tuned.safetensors").write_bytes(tensors.to_bytes(tuned))
    candidate = Candidate.read(tmp_path)
    assert torch.equal(outputs(candidate.network()), outputs(pruned))
    assert torch.equal(outputs(candidate.network(tmp_path / "tuned.safetensors")), outputs(tuned))
    assert len(candidate.plan) == 12


@pytest.mark.filterwarnings("ignore")
def test_networks_that_the_rival_cut_come_back(tmp_path: Path):
    adapter = pytest.importorskip("torch_pruning_adapter")
    dense = zoo.build("vit_depth3").eval()
    rival = adapter.TorchPruning(dense, IMAGES, (None,) * len(list(dense.parameters())))
    for heads in (False, True):
        model = rival.prune(adapter.Setting(heads=heads), 0.5)
        store(tmp_path, model, facts(network="vit_depth3"))
        assert torch.equal(outputs(Candidate.read(tmp_path).network()), outputs(model))
    assert model.blocks[0].attn.num_heads == 1


def test_the_short_tuning_chooses_among_candidates(tmp_path: Path):
    model = zoo.build("resnet8")
    scores = {"first": (0.6, 0.7), "second": (0.4, 0.8), "third": (0.5, 0.1)}
    for name, (before, after) in scores.items():
        folder = folder_of(tmp_path, "resnet8", "torch-pruning", 2.0, name)
        store(folder, model, facts(validation=before))
        assert rows(tmp_path, ["resnet8"], ["torch-pruning"], [2.0])[0].chosen is None or name == "first"
        (folder / "short.json").write_text(json.dumps({"validation": after}))
    write_facts(folder_of(tmp_path, "resnet8", "torch-pruning", 2.0, "none"), facts(error="out of reach"))
    row = Row(folder.parent)
    assert [candidate.folder.name for candidate in row.usable] == ["first", "third", "second"]
    assert row.chosen is not None
    assert row.chosen.folder.name == "second"
    assert rows(tmp_path, ["resnet8"], ["dp"], [2.0]) == rows(tmp_path, ["resnet8"], ["torch-pruning"], [3.0]) == []


def entry(seed: int | None, test: float, latency: float = 0.5, **more: object) -> dict[str, object]:
    share = asdict(Share(latency, latency - 0.01, latency + 0.01, (), (), "engine"))
    known = {"model": "resnet8", "method": "dp", "speedup": 2.0, "block": "distilled", "variant": "", "seed": seed}
    return known | {"test": test, "share": share, "flops": 10**7, "params": 10**5} | more


def test_lines_of_the_table_are_means_over_seeds():
    entries = [entry(0, 0.9), entry(1, 0.92), entry(0, 0.8, block="labels"), entry(0, 0.91, 0.3, speedup=3.0)]
    groups = grouped(entries)
    assert [len(group) for group in groups.values()] == [2, 1, 1]
    assert "91.00% (90.00 to 92.00, 2 seeds)" in line(next(iter(groups.values())))
    slow, fast = (Point(pytest.approx(1 / latency), pytest.approx(91.0), True) for latency in (0.5, 0.3))
    assert points(entries, "dp") == [slow, fast]
    assert points(entries, "dense") == []


def test_a_picture_shows_what_was_tuned_where_that_is_there():
    slow = [entry(0, 0.9), entry(1, 0.92), entry(None, 0.7, block="untuned"), entry(0, 0.8, block="labels")]
    fast = [entry(None, 0.6, 0.25, speedup=3.0, block="untuned"), entry(None, 0.5, speedup=1.5, block="untuned")]
    fast[1]["share"] = None
    assert points(fast + slow, "dp") == [Point(2.0, pytest.approx(91.0), True), Point(4.0, pytest.approx(60.0), False)]
