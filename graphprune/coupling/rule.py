"""What an operator rule is made of: the call it is given, the table it enters, and what holds without a rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphprune.coupling.axes import Axis, freeze, frozen_axis, unify

Axes = list[Axis]
Sizes = Callable[[Any], int]
"""The size of a finished axis (a `Form`) after the cut."""


@dataclass
class Call:
    """One call of an operator: its arguments by name, the axes of its tensors, and its output shape."""

    node: fx.Node
    arguments: dict[str, Any]
    known: dict[fx.Node, Any]
    reason: str
    extra: dict[str, Axis] = field(default_factory=dict)
    """Axes that literals or layers need: `groups` of a convolution or norm, `heads` and `width` of an attention."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def axes(self, name: str) -> Axes:
        """The axes of a tensor argument; none for a number."""
        return self.axes_of(self.arguments[name])

    def axes_of(self, value: Any) -> Axes:
        """The axes of a tensor."""
        return list(self.known.get(value, [])) if isinstance(value, fx.Node) else []

    @property
    def shape(self) -> list[int]:
        """The concrete shape of the (first) output."""
        return shapes_of(self.node)[0]

    def fresh(self, sizes: Sequence[int], why: str) -> Axes:
        """New axes on which nothing may be cut."""
        return [frozen_axis(size, f"{why} ({self.reason})") for size in sizes]


@dataclass(frozen=True)
class Rule:
    """One entry of the table."""

    couple: Callable[[Call], Any]
    literals: Callable[[Call, Any, Sizes], dict[str, Any]] | None = None


RULES: dict[str, Rule] = {}


def operator(*names: str, literals: Callable[[Call, Any, Sizes], dict[str, Any]] | None = None) -> Callable[[Any], Any]:
    """Enter a coupling function into the table under ATen names without overload (`conv2d`), or `namespace::name`."""

    def enter(couple: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for name in names:
            RULES[name] = Rule(couple, literals)
        return couple

    return enter


def concrete(size: Any) -> int:
    """A size as a number: the value of the example input for a symbolic one."""
    return size if isinstance(size, int) else int(size.node.hint)


def shapes_of(node: fx.Node) -> list[list[int]]:
    """The concrete shapes of all output tensors of a node."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [[concrete(size) for size in v.shape] for v in values if isinstance(v, torch.Tensor)]


def dimension(call: Call, name: str, rank: int) -> int:
    return int(call[name]) % rank


def broadcast(call: Call, tensors: Sequence[Axes]) -> Axes:
    """Unify axes from the right; size 1 stretches."""
    rank = max((len(axes) for axes in tensors), default=0)
    result: Axes = []
    for position in range(1, rank + 1):
        here = [axes[-position] for axes in tensors if len(axes) >= position]
        wide = [axis for axis in here if axis.size != 1] or here[:1]
        for axis in wide[1:]:
            unify(wide[0], axis, call.reason)
        result.insert(0, wide[0])
    return result


def unknown(call: Call) -> Any:
    """An operator without a rule: its input axes are frozen and named, its outputs are frozen."""
    why = f"no rule for {call.node.target}"
    for value in call.node.all_input_nodes:
        for axis in _flat(call.known.get(value, [])):
            freeze(axis, f"{why} ({call.reason})")
    outputs = [call.fresh(shape, why) for shape in shapes_of(call.node)]
    many = isinstance(call.node.meta.get("val"), (list, tuple))
    return outputs if many else outputs[0] if outputs else []


def _flat(value: Any) -> Axes:
    return [value] if isinstance(value, Axis) else [axis for item in value for axis in _flat(item)]
