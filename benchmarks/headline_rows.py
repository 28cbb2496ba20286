"""The work folder of `headline.py`: WORK/<model>/<row>/<candidate>/ holds a network and its facts, WORK/<model>/<row>/
tuned/ its weights after fine-tuning. Torch, torchvision and timm are enough to read and to tune it.

A row of Torch-Pruning has a candidate for each of its settings, the others have one. A network that graphprune cut is
stored as graphprune does, any other as its tensors and the numbers in which its modules differ from the whole network.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import zoo
from torch import Tensor, nn

from graphprune.files import atomic, tensors

FACTS, WEIGHTS, PLAN = "facts.json", "model.safetensors", "plan.json"
Facts = dict[str, Any]
"""model, method, speedup (None: at its own latency), network, variant, share, validation, flops, params; or error."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network that could stand in a row."""

    folder: Path
    facts: Facts

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The candidate in a folder."""
        return cls(folder, json.loads((folder / FACTS).read_text()))

    @property
    def usable(self) -> bool:
        """Whether there is a network: its method reached the latency, and it is still in the running."""
        return (self.folder / WEIGHTS).exists()

    @property
    def short(self) -> Path:
        """Where the outcome of the short tuning goes that chooses between candidates."""
        return self.folder / "short.json"

    @property
    def score(self) -> float | None:
        """The validation accuracy after the short tuning."""
        return float(json.loads(self.short.read_text())["validation"]) if self.short.exists() else None

    @property
    def plan(self) -> str | None:
        """A hash of graphprune's plan, where there is one."""
        file = self.folder / PLAN
        return sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else None

    def network(self, weights: Path | None = None) -> nn.Module:
        """The network in evaluation mode, with its own weights or those of a file that `tensors.to_bytes` made."""
        whole = zoo.build(self.facts["network"])
        if (self.folder / PLAN).exists():
            from graphprune.checkpoint import load

            model = load(self.folder, whole)
        else:
            model = resized(whole, tensors.read(self.folder / WEIGHTS), self.facts["attributes"])
        if weights is not None:
            tensors.fill(model, tensors.read(weights))
        return model.eval()


@dataclass(frozen=True)
class Row:
    """A row of the table: a method at a latency."""

    folder: Path

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All candidates, by name."""
        return [Candidate.read(file.parent) for file in sorted(self.folder.glob(f"*/{FACTS}"))]

    @property
    def facts(self) -> Facts:
        """What is the same for all of its candidates."""
        return self.candidates[0].facts

    @property
    def usable(self) -> list[Candidate]:
        """The candidates that have a network, best validation accuracy before tuning first."""
        return sorted((c for c in self.candidates if c.usable), key=lambda c: -c.facts["validation"])

    @property
    def blocks(self) -> tuple[str, ...]:
        """How it is tuned: taught by the dense network, and from labels alone."""
        return ("distilled",) if self.facts["method"].endswith("uncompensated") else ("distilled", "labels")

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that is tuned: the only one, or the best after the short tuning of all; None until then."""
        usable = self.usable
        if len(usable) <= 1:
            return usable[0] if usable else None
        scores = [candidate.score for candidate in usable]
        return None if None in scores else usable[scores.index(max(scores))]

    def tuned(self, block: str, seed: int) -> Path:
        """Where the tuned weights go."""
        return self.folder / "tuned" / f"{block}-{seed}.safetensors"


def rows(work: Path, models: list[str], methods: list[str], speedups: list[float]) -> list[Row]:
    """The rows there are of these models, methods and speed-ups; those at a latency of their own count as well."""
    found = [Row(folder) for model in models for folder in sorted((work / model).glob("*/"))]
    return [row for row in found if row.candidates and _wanted(row.facts, methods, speedups)]


def _wanted(facts: Facts, methods: list[str], speedups: list[float]) -> bool:
    known = facts["method"].removesuffix("-uncompensated") in methods
    return known and (facts["speedup"] is None or facts["speedup"] in speedups)


def folder_of(work: Path, model: str, method: str, speedup: float | None, candidate: str = "only") -> Path:
    """Where a candidate goes."""
    return work / model / (method if speedup is None else f"{method}-{speedup:g}x") / candidate


def write_facts(folder: Path, facts: Facts) -> None:
    """Write the facts of a candidate: last, so that a folder with facts is complete."""
    atomic.write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def store(folder: Path, model: nn.Module, facts: Facts) -> None:
    """Write a network and its facts."""
    whole = zoo.build(facts["network"]).eval()
    atomic.write_bytes(folder / WEIGHTS, tensors.to_bytes(model))
    write_facts(folder, facts | {"attributes": differences(whole, model.eval())})


def differences(whole: nn.Module, pruned: nn.Module) -> dict[str, dict[str, Any]]:
    """The numbers that modules of `pruned` hold otherwise than those of `whole` (`in_channels`, `num_heads`, ...)."""
    found = {}
    for (path, before), (_, after) in zip(whole.named_modules(), pruned.named_modules(), strict=True):
        own = {
            name: value
            for name, value in vars(after).items()
            if isinstance(value, int | tuple) and value != vars(before).get(name)
        }
        if own:
            found[path] = own
    return found


def resized(model: nn.Module, stored: dict[str, Tensor], attributes: dict[str, dict[str, Any]]) -> nn.Module:
    """The model itself, with stored tensors of any size in the place of its own, and the numbers that go with them."""
    for name, own in tensors.named_tensors(model).items():
        own.data = stored[name].clone()
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, tuple(value) if isinstance(value, list) else value)
    return model
