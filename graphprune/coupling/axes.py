"""The algebra of axes: how dimensions of tensors hang together.

Every axis of every tensor is one of three things:

* atomic: `size` indices that may be cut independently of each other;
* a product of axes, row-major: what `reshape(B, N, 3, heads, width)` does to the axis `3 * heads * width`;
* a sum of axes, one after the other: what `cat`, `split` and padding do.

`unify` says that two axes are the same. Where their forms differ they are refined to a common one: 64 unified with
(4 x 16) becomes a product, 64 unified with (32 + 32) a sum. What cannot be lined up is frozen, with the reason.
While an operator table is walked, axes are mutable (`Axis`); afterwards each is frozen into a `Form` over atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(eq=False)
class Axis:
    """An axis under construction. Use the functions of this module; forms change as axes are unified."""

    size: int
    kind: str = "atom"
    parts: list[Axis] = field(default_factory=list)
    link: Axis | None = None
    frozen: dict[str, None] = field(default_factory=dict)


def find(axis: Axis) -> Axis:
    """The representative of an axis."""
    while axis.link is not None:
        axis = axis.link
    return axis


def product(parts: Sequence[Axis]) -> Axis:
    """The row-major product of axes; factors of size 1 vanish."""
    kept = [part for part in parts if part.size != 1]
    if len(kept) == 1:
        return kept[0]
    return Axis(prod(part.size for part in kept), "product" if kept else "atom", list(kept))


def concatenation(parts: Sequence[Axis]) -> Axis:
    """Axes one after the other; empty ones vanish."""
    kept = [part for part in parts if part.size] or list(parts[:1])
    return kept[0] if len(kept) == 1 else Axis(sum(part.size for part in kept), "sum", kept)


def freeze(axis: Axis, reason: str) -> None:
    """Nothing on this axis may be cut, because of `reason`."""
    axis = find(axis)
    if axis.kind == "atom":
        axis.frozen[reason] = None
    for part in axis.parts:
        freeze(part, reason)


def leaves(axis: Axis) -> Iterator[Axis]:
    """The atoms that an axis is made of."""
    axis = find(axis)
    if axis.kind == "atom":
        yield axis
    for part in axis.parts:
        yield from leaves(part)


def unify(one: Axis, other: Axis, reason: str) -> None:
    """Make two axes of equal size the same; `reason` names the operator, for what cannot be lined up."""
    one, other = find(one), find(other)
    if one is other or one.size == 1 or other.size == 1:
        return
    if one.size != other.size:
        for axis in (one, other):
            freeze(axis, f"{reason}: the sizes differ")
        return
    if one.kind != "atom" and other.kind == "atom":
        one, other = other, one
    if one.kind == "atom":
        one.link = other
        for why in one.frozen:
            freeze(other, why)
    elif "sum" in (one.kind, other.kind):
        _unify_sums(one, other, reason)
    else:
        _unify_products([one], [other], reason)


def reshape(before: Sequence[Axis], after: Sequence[Axis], reason: str) -> None:
    """Line up the axes of a tensor before and after a row-major reshape."""
    _unify_products(list(before), list(after), reason)


def _unify_products(left: list[Axis], right: list[Axis], reason: str) -> None:
    while (left := _factors(left)) and (right := _factors(right)):
        one, other = left[0], right[0]
        if one.size == other.size:
            unify(left.pop(0), right.pop(0), reason)
        elif one.size % other.size == 0 and (parts := split(one, other.size)):
            left[:1] = parts
        elif other.size % one.size == 0 and (parts := split(other, one.size)):
            right[:1] = parts
        else:
            _freeze_common_block(left, right, reason)


def _freeze_common_block(left: list[Axis], right: list[Axis], reason: str) -> None:
    """Take the shortest runs of factors with the same product off both lists, and freeze them."""
    taken_left, taken_right = [left.pop(0)], [right.pop(0)]
    while (a := prod(x.size for x in taken_left)) != (b := prod(x.size for x in taken_right)):
        source, sink = (left, taken_left) if a < b else (right, taken_right)
        sink.append(source.pop(0))
    for axis in taken_left + taken_right:
        freeze(axis, f"{reason}: the shapes do not factor")


def _factors(axes: Sequence[Axis]) -> list[Axis]:
    """Products opened, factors of size 1 dropped."""
    flat: list[Axis] = []
    for axis in map(find, axes):
        if axis.kind == "product":
            flat += _factors(axis.parts)
        elif axis.size != 1:
            flat.append(axis)
    return flat


def split(axis: Axis, lead: int) -> list[Axis] | None:
    """Refine an axis to a product whose first factor has size `lead`; None where its form does not allow it."""
    axis = find(axis)
    rest = axis.size // lead
    if axis.kind == "atom":
        parts = [_child(axis, lead), _child(axis, rest)]
    else:
        if any(part.size % rest for part in axis.parts):
            return None
        parts = _split_sum(axis, rest)
    axis.kind, axis.parts, axis.frozen = "product", parts, {}
    return parts


def _split_sum(axis: Axis, rest: int) -> list[Axis]:
    shared, leads = Axis(rest), []
    for part in axis.parts:
        leads.append(Axis(part.size // rest))
        unify(part, product([leads[-1], shared]), "reshape of concatenated axes")
    return [concatenation(leads), shared]


def cut_at(axis: Axis, first: int) -> bool:
    """Refine an axis to a sum with a boundary after index `first`; False where its form does not allow it."""
    axis = find(axis)
    if axis.kind == "atom":
        axis.parts = [_child(axis, first), _child(axis, axis.size - first)]
        axis.kind, axis.frozen = "sum", {}
        return True
    if axis.kind == "product":
        return _cut_product(axis, first)
    offset = 0
    for position, part in enumerate(axis.parts):
        if offset < first < offset + part.size:
            if not cut_at(part, first - offset):
                return False
            axis.parts[position : position + 1] = find(part).parts
            return True
        offset += part.size
    return True


def _cut_product(axis: Axis, first: int) -> bool:
    lead, *rest = _factors([axis])
    width = axis.size // lead.size
    if first % width or not cut_at(lead, first // width):
        return False
    axis.kind, axis.parts = "sum", [product([part, *rest]) for part in find(lead).parts]
    return True


def segments(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    """The consecutive parts of an axis with the given sizes; frozen copies where its form does not allow them."""
    boundaries = np.cumsum([size for size in sizes])[:-1].tolist()
    if not all(cut_at(axis, at) for at in boundaries if 0 < at < axis.size):
        freeze(axis, f"{reason}: the parts do not line up")
        return [frozen_axis(size, f"{reason}: the parts do not line up") for size in sizes]
    axis = find(axis)
    pieces = list(axis.parts) if axis.kind == "sum" else [axis]
    parts: list[Axis] = []
    for size in sizes:
        run: list[Axis] = []
        while sum(piece.size for piece in run) < size:
            run.append(pieces.pop(0))
        parts.append(concatenation(run) if run else Axis(0))
    return parts


def _unify_sums(one: Axis, other: Axis, reason: str) -> None:
    ends = sorted({end for axis in (one, other) for end in _part_ends(axis)})
    sizes = np.diff([0, *ends]).tolist()
    if not all(cut_at(axis, end) for axis in (one, other) for end in ends[:-1]):
        freeze(one, f"{reason}: concatenated parts do not line up")
        freeze(other, f"{reason}: concatenated parts do not line up")
        return
    for left, right in zip(segments(one, sizes, reason), segments(other, sizes, reason), strict=True):
        unify(left, right, reason)


def _part_ends(axis: Axis) -> list[int]:
    axis = find(axis)
    return np.cumsum([part.size for part in axis.parts]).tolist() if axis.kind == "sum" else [axis.size]


def _child(axis: Axis, size: int) -> Axis:
    return Axis(size, frozen=dict(axis.frozen))


def frozen_axis(size: int, reason: str) -> Axis:
    """A new axis on which nothing may be cut."""
    return Axis(size, frozen={reason: None})


@dataclass(frozen=True)
class Form:
    """An axis, finished: an atom (with its number), or a product or sum of forms."""

    size: int
    atom: int = -1
    kind: str = "atom"
    parts: tuple[Form, ...] = ()

    def atoms(self) -> set[int]:
        """The numbers of all atoms in this form."""
        return {self.atom}.union(*(part.atoms() for part in self.parts)) - {-1}

    def kept(self, keep: Mapping[int, Indices]) -> Indices:
        """The indices of this axis that stay when atom `a` keeps the indices `keep[a]` (all where not given)."""
        if self.kind == "atom":
            return keep.get(self.atom, np.arange(self.size))
        if self.kind == "sum":
            offsets = np.cumsum([0] + [part.size for part in self.parts])
            return np.concatenate([o + part.kept(keep) for o, part in zip(offsets, self.parts, strict=False)])
        indices: Indices = np.zeros(1, dtype=np.int64)
        for part in self.parts:
            indices = (indices[:, None] * part.size + part.kept(keep)[None, :]).reshape(-1)
        return indices

    def kept_size(self, sizes: Mapping[int, int]) -> int:
        """How many indices stay when atom `a` keeps `sizes[a]` of its own."""
        if self.kind == "atom":
            return sizes.get(self.atom, self.size)
        join: Callable[[list[int]], int] = sum if self.kind == "sum" else prod
        return join([part.kept_size(sizes) for part in self.parts])


@dataclass
class Finisher:
    """Turns axes into forms, numbering atoms in order of first use and collecting why they are frozen."""

    numbers: dict[int, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    reasons: list[tuple[str, ...]] = field(default_factory=list)
    _alive: list[Axis] = field(default_factory=list)

    def form(self, axis: Axis) -> Form:
        """The form of an axis. Call only after the last `unify`."""
        axis = find(axis)
        if axis.kind != "atom":
            return Form(axis.size, kind=axis.kind, parts=tuple(self.form(part) for part in axis.parts))
        if id(axis) not in self.numbers:
            self.numbers[id(axis)] = len(self.sizes)
            self.sizes.append(axis.size)
            self.reasons.append(tuple(axis.frozen))
            self._alive.append(axis)
        return Form(axis.size, self.numbers[id(axis)])
