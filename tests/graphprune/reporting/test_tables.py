"""The tables: what they say is what the graph, the patterns and the profile say, and they fit a terminal."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from graphprune.engines.fake import FakeEngine
from graphprune.models import create
from graphprune.registry import pattern
from graphprune.reporting.tables import WIDTH
from graphprune.timing.profile import Profile
from tests.graphprune.random_networks import TalkingHeads


class Small(nn.Module):
    """A wide inner group, a residual stream frozen by a literal pad, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 64, 3, padding=1)
        self.outer = nn.Conv2d(64, 24, 1)
        self.classifier = nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.stem(images))
        shortcut = nn.functional.pad(hidden, (0, 0, 0, 0, 4, 4))
        return self.classifier((self.outer(torch.relu(self.inner(hidden))) + shortcut).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return trace(Small(), torch.zeros(2, 3, 16, 16))


@pytest.fixture(scope="module")
def vit() -> ModelGraph:
    model = create("timm:vit_tiny_patch16_224?num_classes=10&img_size=32&depth=1")
    return trace(model, torch.zeros(2, 3, 32, 32))


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile(FakeEngine(), cache=tmp_path / "timings.jsonl")


def line(text: str, *start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.split()[: len(start)] == list(start)]
    return found


def test_group_table_is_a_sequence_of_all_groups(graph: ModelGraph) -> None:
    table = graph.groups()
    assert list(table) == list(graph.all_groups)
    assert len(table) == len(graph.all_groups)
    assert table[0] == graph.all_groups[0]
    assert tuple(table[1:3]) == graph.all_groups[1:3]


def test_group_table_shows_what_can_be_cut_and_why_not(graph: ModelGraph) -> None:
    text = str(graph.groups())
    words = line(text, "inner").split()
    assert words[:4] == ["inner", "channels", "64", "1"]
    assert " ".join(words[4:]) == "inner.weight and 2 more yes: filter"
    frozen = line(text, "classifier")
    assert frozen.endswith("no: it is an output of the model")
    assert "the padding is written in the code" in " ".join(text.split())


def test_obvious_groups_are_counted_not_shown(graph: ModelGraph) -> None:
    obvious = [
        g for g in graph.all_groups if set(g.frozen) & {"it is an input of the model", "a convolution slides over it"}
    ]
    text = str(graph.groups())
    assert obvious
    assert f"not shown: {len(obvious)} frozen" in text
    shown = {name.split()[0] for name in text.splitlines()[1:-2] if not name.startswith(" ")}
    assert shown == {group.name for group in graph.all_groups if group not in obvious}


class Beside(nn.Module):
    """An MLP, and a layer beside it of which nothing can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.beside = nn.Linear(12, 64), nn.Linear(64, 5), nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.down(torch.relu(self.up(x))), self.beside(x)


def test_share_of_what_can_be_cut(vit: ModelGraph) -> None:
    graph = trace(Beside(), torch.zeros(2, 12))
    share = f"{64 * 17 / (64 * 17 + 12 * 20):.0%}"
    ending = f"layers with {share} of the FLOPs and {share} of the weights"
    assert str(graph.groups()).endswith(f"groups that can be cut reach {ending}")
    assert str(graph.sites()).endswith(f"sites with a choice reach {ending}")
    assert str(vit.groups()).endswith("layers with 100% of the FLOPs and 100% of the weights")


def test_site_rows_without_a_profile_are_the_structural_levels(graph: ModelGraph) -> None:
    rows = {row.name: row for row in graph.sites()}
    assert list(rows) == [site.name for site in graph.all_sites]
    levels = [(level.pattern, level.level, level.count, level.gain) for level in rows["inner/channels"].levels]
    assert levels == [("filter", f"{count} of 64", count, None) for count in (48, 32, 16)]
    names = ("kernel", "kernel-mix")
    kernel = [level for name in names for level in pattern(name).levels(graph.site["inner/kernel"], 16)]
    assert [level.level for level in rows["inner/kernel"].levels] == [level.name for level in kernel]


def test_site_rows_with_a_profile_are_the_legal_levels_with_their_gain(graph: ModelGraph, profile: Profile) -> None:
    rows = {row.name: row for row in graph.sites(profile)}
    for site in graph.all_sites:
        expected = {}
        for name in ("filter", "kernel", "kernel-mix", "block"):
            for level in pattern(name).legal(graph, site, profile):
                cuts = pattern(name).rewrite(site, pattern(name).sample(site, level))
                layers = [graph.layer[node] for node in site.layers]
                dense = sum(profile.seconds(layer.operator) for layer in layers)
                cut = sum(profile.seconds(cuts.operator(layer)) for layer in layers)
                expected[name, level.name] = pytest.approx(dense / cut)
        assert {(level.pattern, level.level): level.gain for level in rows[site.name].levels} == expected
    assert rows["inner/channels"].levels
    assert all(level.gain > 1 for row in rows.values() for level in row.levels if level.gain is not None)


def test_everything_is_measured_together(graph: ModelGraph, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile.block == 16
    before, after = profile.engine.calls, []
    fill = profile.fill

    def spied(*arguments: object) -> None:
        fill(*arguments)
        after.append(profile.engine.calls)

    monkeypatch.setattr(profile, "fill", spied)
    str(graph.sites(profile))
    assert before < after[0] == after[-1]
    assert len(after) > 1


def test_reasons_for_an_empty_site(vit: ModelGraph, graph: ModelGraph, profile: Profile) -> None:
    talking = trace(TalkingHeads(8, 2), torch.zeros(2, 5, 8))
    assert line(str(talking.sites()), "v/other").endswith("no pattern cuts it")
    single = trace(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)), torch.zeros(2, 3, 8, 8))
    assert line(str(single.sites(profile)), "0/channels").endswith("too small for a level (blocks of 16)")


def test_masks_are_told_in_one_line_where_they_gain_nothing(vit: ModelGraph, tmp_path: Path) -> None:
    linear = {site.name for site in vit.all_sites if site.kernel == (1, 1)} - {"blocks.0.mlp.fc1/kernel"}
    profile = Profile(FakeEngine(), cache=tmp_path / "timings.jsonl")
    for table in (vit.sites(), vit.sites(profile)):
        told = [text for text in str(table).splitlines() if "n-of-m" in text]
        assert told == [
            f"not shown: {len(linear)} layers for n-of-m: masks gain nothing but on engines with 2:4 kernels"
        ]
        assert not linear & {text.split()[0] for text in str(table).splitlines()}
        assert [row.levels for row in table if row.name in linear] == [()] * len(linear)
        assert line(str(table), "blocks.0.mlp.fc1/kernel", "kernel", "1", "groups")
    sparse = Profile(FakeEngine(sparse_kernels=True), cache=tmp_path / "timings.jsonl")
    assert line(str(vit.sites(sparse)), "head/kernel").endswith("nothing gains beyond noise")


def test_printed_levels(graph: ModelGraph, profile: Profile) -> None:
    assert line(str(graph.sites()), "inner/channels").endswith("48 of 64, 32 of 64, 16 of 64")
    kernel, mixed = (row for row in str(graph.sites()).splitlines() if row.startswith("inner/kernel"))
    assert kernel.endswith("3x2, 2x3, 2x2, 3x1, 1x3, 1x1")
    assert mixed.endswith("3x3 3x3 3x1 1x3, 3x2 2x3 each side, 2x2 each corner, 3x1 1x3")
    row = next(row for row in graph.sites(profile) if row.name == "inner/channels")
    printed = ", ".join(f"{level.level}: {level.gain:.2f}x" for level in row.levels)
    assert line(str(graph.sites(profile)), "inner/channels").endswith(printed)


def test_everything_fits_a_terminal(graph: ModelGraph, vit: ModelGraph, profile: Profile) -> None:
    for text in (str(graph.groups()), str(vit.groups()), str(vit.sites()), str(graph.sites(profile))):
        assert max(map(len, text.splitlines())) <= WIDTH


def test_long_names_keep_their_end() -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            inner = Deep(depth - 1) if depth else nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 1))
            self.a_rather_long_name = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.a_rather_long_name(images)

    graph = trace(Deep(6), torch.zeros(2, 3, 8, 8))
    for text in (str(graph.groups()), str(graph.sites())):
        assert max(map(len, text.splitlines())) <= WIDTH
        assert "…" in text
    assert "long_name.0/channels" in str(graph.sites())


def test_json(graph: ModelGraph, profile: Profile) -> None:
    body = json.loads(json.dumps(graph.sites(profile).to_dict()))
    assert body["engine"] == profile.engine.identity
    assert body["block"] == profile.block
    assert [site["name"] for site in body["sites"]] == [site.name for site in graph.all_sites]
    inner = next(site for site in body["sites"] if site["name"] == "inner/channels")
    assert {level["pattern"] for level in inner["levels"]} == {"filter"}
    assert graph.sites().to_dict()["engine"] is None


def test_what_repeats_is_told_once(tmp_path: Path) -> None:
    model = create("timm:vit_tiny_patch16_224?num_classes=10&img_size=32&depth=3")
    deep = trace(model, torch.zeros(2, 3, 32, 32))
    profile = Profile(FakeEngine(), cache=tmp_path / "timings.jsonl")
    sites = str(deep.sites(profile))
    first = line(sites, "blocks.0.mlp.fc1/hidden")
    assert "576 of 768: " in first
    for number in (1, 2):
        assert line(sites, f"blocks.{number}.mlp.fc1/hidden").endswith(" as blocks.0.mlp.fc1/hidden")
    groups = str(deep.groups())
    assert line(groups, "pos_embed#1").split("no: ")[1].startswith("spatial")
    assert line(groups, "pos_embed#2").endswith("no: as pos_embed#1")
    assert line(groups, "blocks.0.attn.qkv", "other").endswith("no: taken apart (unbind)")  # in blocks.0.attn: known


def test_lines_break_between_levels_only(graph: ModelGraph, profile: Profile) -> None:
    lines = [text.rstrip() for text in str(graph.sites(profile)).splitlines()]
    wrapped = [text for text, after in pairwise(lines) if after.startswith(" " * 40)]
    assert wrapped
    assert all(text.endswith("x,") for text in wrapped)


def test_a_kernel_without_levels_is_not_called_too_small() -> None:
    patches = trace(nn.Sequential(nn.Conv2d(3, 32, 4, stride=4)), torch.zeros(2, 3, 16, 16))
    assert line(str(patches.sites()), "0/kernel").endswith("no level for 4x4")
    linear = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(2, 6))
    assert line(str(linear.sites()), "0/kernel").endswith("too small for a level (blocks of 16)")
