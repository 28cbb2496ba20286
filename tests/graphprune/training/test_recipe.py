"""Losses against their definition; recipes that make no sense are refused."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from graphprune import models
from graphprune.errors import InputError
from graphprune.training.recipe import Recipe, distillation, repair_batch_norm


def test_distillation_against_its_definition() -> None:
    student, teacher, temperature = torch.randn(4, 5), torch.randn(4, 5), 3.0
    total = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(value / temperature) for value in theirs]
        q = [math.exp(value / temperature) for value in mine]
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = temperature**2 * total / 4
    assert float(distillation(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


def test_distillation_is_least_at_the_teacher() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    loss = distillation(logits, logits.detach(), 4.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_loss_combines_teacher_and_labels() -> None:
    logits, taught, targets = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    recipe = Recipe(alpha=0.7, temperature=2.0, label_smoothing=0.1)
    labels = functional.cross_entropy(logits, targets, label_smoothing=0.1)
    both = 0.7 * distillation(logits, taught, 2.0) + 0.3 * labels
    torch.testing.assert_close(recipe.loss(logits, targets, taught), both)
    torch.testing.assert_close(recipe.loss(logits, targets, None), labels)
    torch.testing.assert_close(recipe.loss(logits, None, taught), distillation(logits, taught, 2.0))
    with pytest.raises(InputError, match="needs labels"):
        recipe.loss(logits, None, None)


def test_optimiser_follows_the_network() -> None:
    convolutional, attention = models.create("cifar:resnet20"), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert Recipe().optimizer_options(convolutional, True) == {"opt": "sgd", "lr": 0.1, "weight_decay": 5e-4}
    assert Recipe().optimizer_options(attention, False) == {"opt": "adamw", "lr": 5e-4, "weight_decay": 0.05}
    own = Recipe(optimizer="lamb", lr=0.3, weight_decay=0.0).optimizer_options(attention, False)
    assert own == {"opt": "lamb", "lr": 0.3, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"alpha": 1.5},
        {"warmup": -0.1},
        {"ema_decay": 2},
        {"temperature": 0},
        {"lr": 0.0},
        {"precision": "float16"},
        {"epochs": math.nan},
    ],
)
def test_recipes_that_make_no_sense(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"recipe.*{next(iter(values))}"):
        Recipe(**values)  # type: ignore[arg-type]


def test_batch_norm_gets_a_momentum_where_it_has_none() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=None), nn.BatchNorm1d(2, momentum=0.3))  # type: ignore[arg-type]
    repair_batch_norm(model)
    assert [module.momentum for module in model] == [0.1, 0.3]
