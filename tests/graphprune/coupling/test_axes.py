"""The algebra of axes, against masks of numpy arrays that are reshaped, joined and split for real."""

from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.coupling.axes import (
    Axis,
    Finisher,
    Form,
    concatenation,
    freeze,
    product,
    reshape,
    segments,
    split,
    unify,
)
from tests.graphprune.oracle import Keep, axis_mask


def finished(*axes: Axis) -> tuple[list[Form], Finisher]:
    finisher = Finisher()
    return [finisher.form(axis) for axis in axes], finisher


def outer(masks: list[np.ndarray]) -> np.ndarray:
    return reduce(np.logical_and.outer, masks, np.ones((), dtype=bool))


# --- single steps, closed form --------------------------------------------------------------------------------------


def test_reshape_refines_an_atom_to_the_factors() -> None:
    packed, three, heads, width = Axis(24), Axis(3), Axis(2), Axis(4)
    reshape([packed], [three, heads, width], "view")
    (form,), finisher = finished(packed)
    assert finisher.sizes == [3, 2, 4]
    assert form.kept({1: np.array([1])}).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert form.kept_size({1: 1, 2: 3}) == 9


def test_concatenation_keeps_the_parts_apart() -> None:
    left, right = Axis(3), Axis(4)
    (form,), _ = finished(concatenation([left, right]))
    assert form.kept({0: np.array([2]), 1: np.array([0, 3])}).tolist() == [2, 3, 6]


def test_sums_with_shifted_boundaries_are_cut_at_all_of_them() -> None:
    one, other = concatenation([Axis(2), Axis(6)]), concatenation([Axis(5), Axis(3)])
    unify(one, other, "add")
    forms, finisher = finished(one, other)
    assert forms[0] == forms[1]
    assert finisher.sizes == [2, 3, 3]


def test_what_does_not_factor_is_frozen_with_its_reason() -> None:
    six, four = [Axis(2), Axis(3)], [Axis(3), Axis(2)]
    reshape(six, four, "view in here")
    _, finisher = finished(*six, *four)
    assert all(reasons == ("view in here: the shapes do not factor",) for reasons in finisher.reasons)


def test_a_refined_axis_may_occur_twice_in_one_reshape() -> None:
    square = Axis(4)
    reshape([square, square], [Axis(2), Axis(2), Axis(2), Axis(2)], "view")
    (form,), finisher = finished(square)
    assert (form.kind, finisher.sizes) == ("product", [2, 2])


def test_sizes_that_differ_freeze_both() -> None:
    one, other = Axis(4), Axis(6)
    unify(one, other, "a wrong rule")
    _, finisher = finished(one, other)
    assert finisher.reasons == [("a wrong rule: the sizes differ",)] * 2


def test_frozen_stays_frozen_through_refinement_and_unification() -> None:
    whole, other = Axis(8), Axis(8)
    freeze(whole, "an input")
    assert split(whole, 2) is not None
    unify(other, whole, "add")
    _, finisher = finished(other)
    assert finisher.reasons == [("an input",), ("an input",)]


def test_empty_parts_vanish() -> None:
    axis = Axis(5)
    joined = concatenation([axis, Axis(0)])
    unify(joined, axis, "add")
    assert joined is axis


@pytest.mark.parametrize("sizes", [[2, 4], [4, 2], [6], [0, 6], [1, 2, 3]])
def test_segments_of_a_product_where_they_line_up(sizes: list[int]) -> None:
    lead, rest = Axis(3), Axis(2)
    parts = segments(product([lead, rest]), sizes, "split")
    assert [part.size for part in parts] == sizes
    _, finisher = finished(*parts)
    lined_up = all(size % 2 == 0 for size in sizes)
    assert any(finisher.reasons) is not lined_up


# --- random programs ------------------------------------------------------------------------------------------------


class Program:
    """A pool of axes, what was done with them, and the array identities that must then hold for masks."""

    def __init__(self, data: Any) -> None:
        self.data = data
        sizes = st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=2, max_size=4)
        self.pool = [Axis(size) for size in data.draw(sizes)]
        self.identities: list[tuple[str, list[Axis], list[Axis]]] = []

    def pick(self, most: int) -> list[Axis]:
        return self.data.draw(st.lists(st.sampled_from(self.pool), min_size=1, max_size=most))

    def step(self) -> None:
        getattr(self, self.data.draw(st.sampled_from(["reshape", "join", "part", "same", "same", "freeze"])))()

    def reshape(self) -> None:
        before, after = self.pick(3), []
        left = int(np.prod([axis.size for axis in before]))
        if left > 600:
            return
        while left > 1 and len(after) < 4:
            divisors = [n for n in range(2, left + 1) if left % n == 0]
            after.append(Axis(self.data.draw(st.sampled_from(divisors))))
            left //= after[-1].size
        after += [Axis(left)] if left > 1 else []
        reshape(before, after, "reshape")
        self.record("reshape", before, after, after)

    def join(self) -> None:
        parts = self.pick(3)
        whole = concatenation(parts)
        if whole.size <= 60:
            self.record("join", parts, [whole], [whole])

    def part(self) -> None:
        whole = self.pick(1)[0]
        ends = sorted(self.data.draw(st.sets(st.integers(1, whole.size - 1), max_size=2))) if whole.size > 1 else []
        sizes = np.diff([0, *ends, whole.size]).tolist()
        parts = segments(whole, sizes, "split")
        self.record("join", parts, [whole], parts)

    def same(self) -> None:
        one = self.pick(1)[0]
        other = self.data.draw(st.sampled_from([axis for axis in self.pool if axis.size == one.size]))
        unify(one, other, "add")
        self.record("reshape", [one], [other], [])

    def freeze(self) -> None:
        if self.data.draw(st.integers(0, 3)) == 0:
            freeze(self.pick(1)[0], "frozen by the test")

    def record(self, kind: str, left: list[Axis], right: list[Axis], new: list[Axis]) -> None:
        self.identities.append((kind, left, right))
        self.pool += new


@given(st.data())
def test_random_programs_keep_masks_consistent(data: Any) -> None:
    program = Program(data)
    for _ in range(data.draw(st.integers(1, 8))):
        program.step()
    finisher = Finisher()
    forms = {id(axis): finisher.form(axis) for _, left, right in program.identities for axis in (*left, *right)}
    keep: Keep = {}
    for atom, (size, reasons) in enumerate(zip(finisher.sizes, finisher.reasons, strict=True)):
        if not reasons and size > 1:
            keep[atom] = tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    for kind, left, right in program.identities:
        one, other = ([axis_mask(forms[id(axis)], keep) for axis in axes] for axes in (left, right))
        if kind == "join":
            assert np.array_equal(np.concatenate(one), other[0])
        else:
            assert np.array_equal(outer(one).reshape(-1), outer(other).reshape(-1))
    for form in forms.values():
        indices = {atom: np.array(kept) for atom, kept in keep.items()}
        assert np.array_equal(form.kept(indices), np.flatnonzero(axis_mask(form, keep)))
        assert form.kept_size({atom: len(kept) for atom, kept in keep.items()}) == axis_mask(form, keep).sum()
