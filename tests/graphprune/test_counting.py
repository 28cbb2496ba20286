"""Counts against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from graphprune.counting import Counts, count
from graphprune.coupling.tracing import trace
from graphprune.cutting.surgery import apply
from graphprune.errors import InputError
from graphprune.models import create
from graphprune.uniform import uniform_plan


class Attention(nn.Module):
    """`heads` heads of the given widths over `tokens` tokens, without projections."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = tokens.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        return functional.scaled_dot_product_attention(query, query, query)


def test_convolution_with_groups() -> None:
    model = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4)
    expected = 2 * 32 * 10 * 12 * (16 // 4) * 9
    assert count(model, torch.zeros(3, 16, 20, 24)) == Counts(expected, 32 * 4 * 9 + 32)


def test_linear_over_tokens() -> None:
    assert count(nn.Linear(12, 7), torch.zeros(5, 9, 12)) == Counts(2 * 9 * 12 * 7, 12 * 7 + 7)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_counted(heads: int) -> None:
    tokens, width = 65, 16
    counts = count(Attention(heads, width), torch.zeros(2, tokens, heads * width))
    assert counts.flops == 2 * heads * tokens * tokens * (width + width)


def test_fused_encoder_layer_is_counted() -> None:
    width, hidden, tokens = 16, 40, 9
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    projections = 2 * tokens * width * (4 * width + 2 * hidden)
    assert count(layer, torch.zeros(2, tokens, width)).flops == projections + 4 * tokens * tokens * width


def test_shared_parameters_count_once() -> None:
    first = nn.Linear(6, 6, bias=False)
    assert count(nn.Sequential(first, first), torch.zeros(1, 6)) == Counts(2 * 2 * 36, 36)


def test_modes_come_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4))
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count(model, torch.ones(2, 4))
    assert [module.training for module in model] == [False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_graph_agrees_before_and_after_a_cut() -> None:
    model, images = (
        create("timm:vit_tiny_patch16_224?num_classes=10&img_size=32&depth=1&embed_dim=48"),
        torch.zeros(1, 3, 32, 32),
    )
    graph = trace(model, images)
    assert count(model, images).flops == graph.flops
    plan = uniform_plan(graph, 0.5)
    pruned = apply(model, plan, graph)
    assert count(pruned, images).flops == trace(pruned, images).flops < graph.flops


def test_wrong_input_is_one_line() -> None:
    with pytest.raises(InputError, match=r"does not accept an input of shape \(1, 5\)") as caught:
        count(nn.Linear(4, 4), torch.zeros(1, 5))
    assert "\n" not in str(caught.value)
