"""Torch-Pruning 1.6 as its documentation uses it, for comparison at equal latency (extra `bench`).

The classifier is ignored, the model is traced with example inputs, and importance is that of the groups; Taylor
importance reads the gradients of the training loss over a few batches.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from graphprune.tasks.task import Batch, Task

GRADIENT_BATCHES = 10


@dataclass(frozen=True)
class Setting:
    """One way to use it.

    `importance` is one of IMPORTANCES, `scope` one of SCOPES: within each group, over all of them, or over those of the
    same structure (isomorphic pruning, ECCV 2024). `heads` cuts whole heads and hidden units of a transformer, not the
    embedding and the width of heads: the options `--bottleneck` and `--prune_num_heads` of its examples.
    """

    importance: str = "magnitude"
    scope: str = "uniform"
    round_to: int | None = None
    heads: bool = False

    @property
    def name(self) -> str:
        """How a row of results calls it."""
        kind = " heads" if self.heads else ""
        return f"torch-pruning {self.importance} {self.scope}{kind} round_to {self.round_to or 'none'}"


IMPORTANCES: dict[str, Callable[[], torch_pruning.importance.Importance]] = {
    "magnitude": lambda: torch_pruning.importance.MagnitudeImportance(p=2),
    "taylor": torch_pruning.importance.TaylorImportance,
    "bn-scale": torch_pruning.importance.BNScaleImportance,
}
SCOPES = ("uniform", "global", "isomorphic")


def settings() -> Iterator[Setting]:
    """Both importances, uniform and global, with channels in whole engine blocks and without."""
    for importance, scope, round_to in product(("magnitude", "taylor"), ("uniform", "global"), (16, None)):
        yield Setting(importance, scope, round_to)


def all_settings(model: nn.Module) -> Iterator[Setting]:
    """Every importance that the model has the layers for, every scope and rounding, with and without whole heads."""
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    importances = [name for name in IMPORTANCES if normed or name != "bn-scale"]
    heads = (False, True) if _fused_attention(model) else (False,)
    for importance, scope, round_to, whole in product(importances, SCOPES, (None, 8, 16), heads):
        yield Setting(importance, scope, round_to, whole)


@dataclass(frozen=True)
class TorchPruning:
    """A dense model, and the gradients [as its parameters] that Taylor importance reads."""

    dense: nn.Module
    example: Tensor
    gradients: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, dense: nn.Module, task: Task) -> "TorchPruning":
        """Take the gradients over the first training batches; the dense model is untouched."""
        assert task.train is not None, "Taylor importance needs labelled training data"
        batches = list(islice(task.train(0), GRADIENT_BATCHES))
        return cls(dense, task.example_inputs[0], _gradients(dense, batches))

    def prune(self, setting: Setting, ratio: float) -> nn.Module:
        """A pruned copy in evaluation mode, with the weights that are left."""
        model = copy.deepcopy(self.dense).eval()
        for parameter, gradient in zip(model.parameters(), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        _prune(model, self.example, setting, ratio)
        model.zero_grad(set_to_none=True)
        return model.eval()


def halve(model: nn.Module, example: Tensor, ratio: float, round_to: int) -> nn.Module:
    """A copy with a share of the channels of every group gone, by magnitude; the output layer is ignored."""
    pruned = copy.deepcopy(model).eval()
    _prune(pruned, example, Setting(round_to=round_to), ratio)
    return pruned


def halving_pruner(model: nn.Module, example: Tensor, ratio: float, round_to: int) -> torch_pruning.pruner.BasePruner:
    """The pruner that `halve` uses, of the model itself, its dependency graph built."""
    return _pruner(model, example, Setting(round_to=round_to), ratio)


def _prune(model: nn.Module, example: Tensor, setting: Setting, ratio: float) -> None:
    """Prune the model itself. Heads of fused attention are followed as the examples for timm's transformers do."""
    pruner = _pruner(model, example, setting, ratio)
    pruner.step()
    for module in _fused_attention(model):
        module.num_heads = pruner.num_heads[module.qkv]
        module.attn_dim = module.qkv.out_features // 3  # timm has had this attribute since those examples
        module.head_dim = module.attn_dim // module.num_heads


def _pruner(model: nn.Module, example: Tensor, setting: Setting, ratio: float) -> torch_pruning.pruner.BasePruner:
    attention = _fused_attention(model)
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=IMPORTANCES[setting.importance](),
        global_pruning=setting.scope != "uniform",
        isomorphic=setting.scope == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=_ignored(model, setting.heads),
        round_to=setting.round_to,
        num_heads={module.qkv: module.num_heads for module in attention},
        prune_num_heads=setting.heads,
        prune_head_dims=not setting.heads,
        head_pruning_ratio=min([ratio, *(1 - 1 / module.num_heads for module in attention)]) if setting.heads else 0.0,
    )


def _ignored(model: nn.Module, bottleneck: bool) -> list[nn.Module]:
    """The output layer; for cuts inside of transformer blocks, also the layers that write to the embedding."""
    outputs: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1:]
    if not bottleneck:
        return outputs
    writers = [name for name, _ in model.named_modules() if name.endswith(("attn.proj", "mlp.fc2", "patch_embed.proj"))]
    return [*outputs, *map(model.get_submodule, writers)]


def _fused_attention(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Linear) and hasattr(m, "num_heads")]


def _gradients(dense: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor | None, ...]:
    model = copy.deepcopy(dense).eval()
    for inputs, targets in batches:
        assert targets is not None
        torch.autograd.backward(functional.cross_entropy(model(inputs), targets) / len(batches))
    return tuple(parameter.grad for parameter in model.parameters())
