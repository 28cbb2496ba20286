"""A geometry for each filter: what is offered, who gets which, and that the sorted parts compute the masked kernel."""

from itertools import permutations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from graphprune.coupling.graph import ModelGraph, Site
from graphprune.coupling.operators import Convolution, Mixture
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts, resolve
from graphprune.cutting.routes import Route
from graphprune.cutting.surgery import cut_along, operate
from graphprune.cutting.window import MixedConv2d
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.pattern import Level
from graphprune.patterns.kernel_mix import KernelMix
from graphprune.plan import Choice, Plan
from graphprune.repairing.calibration import calibrate
from graphprune.repairing.compensation import Loss
from graphprune.repairing.repair import make_reference, repair
from graphprune.searching.candidates import kept_features
from tests.graphprune.networks import conv_bn
from tests.graphprune.oracle import masked_outputs, outputs_of, relative_error, scramble
from tests.graphprune.tiny import LinearProfile, candidates

MIX = KernelMix()
COLUMN, ROW = ((0, 3), (1, 2)), ((1, 2), (0, 3))


def site(filters: int, order: int = 0, kernel: tuple[int, int] = (3, 3)) -> Site:
    given = {"kernel": kernel, "order": order, "filters": filters, "channels": 8}
    return Site("conv/kernel", "kernel", kernel[0] * kernel[1], ("conv",), "conv", **given)  # type: ignore[arg-type]


def level(made: Site, name: str) -> Level:
    return next(one for one in MIX.levels(made, 4) if one.name == name)


class Block(nn.Module):
    """A residual block: the inner channels may be put in any order, those of the stream may not."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(16)
        self.outer = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=bias)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.outer(torch.relu(self.norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


def block(bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ModelGraph, torch.Tensor]:
    torch.manual_seed(0)
    model = scramble(Block(bias), dtype=dtype)
    x = torch.randn(4, 3, 12, 10, dtype=dtype)
    return model, trace(model, x), x


def mixed_plan(graph: ModelGraph, *others: Choice, level_name: str = "3x1 1x3") -> Plan:
    inner = graph.site["inner/kernel"]
    keep = MIX.choose(inner, level(inner, level_name), np.random.default_rng(3).normal(size=(16, 11)))
    return Plan(graph.signature, (Choice(inner.name, "kernel-mix", level_name, keep), *others), graph.inputs)


def test_a_mixed_convolution_in_an_exported_graph_keeps_its_batch_norm() -> None:
    model, graph, x = block()
    given = mixed_plan(graph)
    graphed = cut_along(model, graph, resolve(graph, given), Route(own_class=False))
    own = operate(model, graph, given).model
    assert relative_error(outputs_of(graphed, (x,)), outputs_of(own, (x,))) < 1e-10
    with torch.no_grad():
        assert relative_error([graphed.train()(x)], [own.train()(x)]) < 1e-10


def test_levels_share_the_filters_in_whole_blocks() -> None:
    names = [one.name for one in MIX.levels(site(64), 16)]
    assert names == ["3x3 3x3 3x1 1x3", "3x2 2x3 each side", "2x2 each corner", "3x1 1x3"]
    assert [one.count for one in MIX.levels(site(64), 16)] == [16 * (9 + 9 + 3 + 3), 64 * 6, 64 * 4, 64 * 3]
    assert [one.name for one in MIX.levels(site(32), 16)] == ["3x1 1x3"]
    for other in (site(16), site(40), site(64, order=-1), site(64, kernel=(5, 5)), site(64, kernel=(1, 3))):
        assert MIX.levels(other, 16) == ()


def test_filters_go_where_the_total_score_is_highest() -> None:
    made = site(4)
    one = MIX.levels(made, 2)[-1]
    scores = np.random.default_rng(0).normal(size=(4, len(MIX.patches(made))))
    found = MIX.rewrite(made, MIX.choose(made, one, scores)).mixes["conv"]
    windows = [patch[:2] for patch in MIX.patches(made)]
    columns, rows = (windows.index(window) for window in (COLUMN, ROW))
    shares = set(permutations([columns, columns, rows, rows]))
    best = max(shares, key=lambda share: sum(scores[filter_, window] for filter_, window in enumerate(share)))
    assert found == tuple(windows[window] for window in best)


def test_what_is_no_mix_is_refused() -> None:
    made = site(2)
    for keep in ((0, 1, 2), (0, 8, 9), (0, 2, 9), tuple(range(9))):
        with pytest.raises(InputError, match=r"rectangle|free order"):
            MIX.rewrite(made, keep)
    with pytest.raises(InputError, match="free order"):
        MIX.rewrite(site(2, order=-1), (1, 4, 7, 12, 13, 14))


def test_one_geometry_for_all_is_a_plain_window() -> None:
    keep = tuple(filter_ * 9 + tap for filter_ in range(3) for tap in (1, 4, 7))
    cuts = MIX.rewrite(site(3), keep)
    assert cuts.windows == {"conv": COLUMN}
    assert not cuts.mixes
    assert not cuts.order


def test_only_filters_that_nothing_else_makes_are_free() -> None:
    _, graph, _ = block()
    assert graph.site["inner/kernel"].order == graph.layer[graph.site["inner/kernel"].node].outputs.atom
    assert graph.site["stem.0/kernel"].order == -1
    assert graph.site["outer/kernel"].order == -1


@pytest.mark.parametrize("bias", [False, True])
def test_mixed_with_cut_filters_inputs_and_a_kernel_behind_it(bias: bool) -> None:
    model, graph, x = block(bias)
    others = (
        Choice("inner/channels", "filter", "some", (0, 2, 3, 4, 7, 8, 9, 12, 13, 15)),
        Choice("stem.0/channels", "filter", "some", (1, 2, 5, 6, 8, 9, 14)),
        Choice("outer/kernel", "kernel", "1x3 top", (0, 1, 2)),
    )
    for name in ("3x1 1x3", "2x2 each corner", "3x3 3x3 3x1 1x3"):
        plan = mixed_plan(graph, *others, level_name=name)
        operation = operate(model, graph, plan)
        assert operation.own_class
        assert isinstance(operation.model.inner, MixedConv2d)
        expected = masked_outputs(graph, plan, model, (x,))
        assert relative_error(outputs_of(operation.model, (x,)), expected) < 1e-10
        parts = operation.model.inner.parts
        operator = resolve(graph, plan).operator(graph.layer[graph.site["inner/kernel"].node])
        assert isinstance(operator, Mixture)
        assert [part.outputs for part in operator.parts] == [part.out_channels for part in parts]
        assert operator.parameters == sum(part.weight.numel() for part in parts)
        assert sum(part.out_channels for part in parts) == 10


def test_no_gather_remains_and_norms_move_into_the_parts() -> None:
    model, graph, x = block(dtype=torch.float32)
    plan = mixed_plan(graph)
    exported = onnx_bytes(operate(model, graph, plan).model, x)
    operations = [node.op_type for node in onnx.load_from_string(exported).graph.node]
    assert operations.count("Conv") == 4
    assert operations.count("Relu") == 3  # one behind the stem, one in each part
    assert not {"Gather", "BatchNormalization"} & {*operations}
    (found,) = OnnxRuntimeEngine().run(exported, {onnx.load_from_string(exported).graph.input[0].name: x.numpy()})
    assert relative_error([torch.from_numpy(found)], masked_outputs(graph, plan, model, (x,))) < 1e-4


def test_repair_solves_every_part() -> None:
    model, graph, _ = block(dtype=torch.float32)
    images = torch.randn(96, 3, 12, 10)
    cuts = resolve(graph, mixed_plan(graph))
    pruned = operate(model, graph, mixed_plan(graph)).model
    sliced = [part.weight.clone() for part in pruned.inner.parts]
    with torch.no_grad():
        stream = model.stem(images)
        wanted = model.inner(stream)[:, cuts.kept[graph.site["inner/kernel"].order]]

    def error() -> float:
        with torch.no_grad():
            return float((pruned.inner(stream) - wanted).var((0, 2, 3)).sum() / wanted.var((0, 2, 3)).sum())

    before = error()
    repair(pruned, model, graph, cuts, make_reference(graph, [images]))
    assert all(not torch.equal(part.weight, old) for part, old in zip(pruned.inner.parts, sliced, strict=True))
    assert error() < before * 0.99


def test_the_error_of_a_mix_is_that_of_its_filters() -> None:
    _, graph, _ = block(dtype=torch.float32)
    statistics = calibrate(graph, [torch.randn(32, 3, 12, 10)])
    made = candidates(graph, statistics, LinearProfile(block=4))
    node = graph.site["inner/kernel"].node
    layer, moments = graph.layer[node], statistics[node]
    options = {draft.level: draft for draft in made.drafts["inner/kernel"] if draft.pattern == "kernel-mix"}
    assert len(options) == 4
    assert isinstance(layer.operator, Convolution)
    for draft in options.values():
        expected = 0.0
        for filter_, window in enumerate(draft.cuts.mixes[node]):
            kept = kept_features(layer, Cuts(windows={node: window}))
            one = torch.tensor([filter_])
            weight = moments.weight[:, one].double()
            share = weight @ moments.matrix * weight
            expected += Loss(moments, one).error(kept) * float(share.sum()) / moments.energy
        assert made._layer_error(layer, draft.cuts) == pytest.approx(expected, rel=1e-3)
