"""Attributes of modules that hold a size of their code: which of them follow when a cut changes a literal."""

from collections.abc import Iterator, Mapping
from typing import Any

Change = tuple[str, str, Any, Any]
"""Path of the module whose code made the call, argument of the call, its value before and after the cut."""


def holds_by_name(attributes: Mapping[str, Any], change: Change) -> bool:
    """Whether the attribute with the name of the argument holds the literal (`normalized_shape`)."""
    _, name, before, _ = change
    return before is not None and name in attributes and _as_tuple(attributes[name]) == _as_tuple(before)


def holders(attributes: Mapping[str, Any], change: Change) -> Iterator[tuple[str, Any]]:
    """Attributes that hold the literal, one of its sizes, or the sum of the sizes of a split; with their new values."""
    for old, new in [*_size_pairs(change), *_whole_pairs(change)]:
        for attribute, value in attributes.items():
            if _equal(value, old):
                yield attribute, type(value)(new)


def reached(attributes: Mapping[str, Any], change: Change) -> bool:
    """Whether attributes hold all that changes in the literal."""

    def known(old: Any) -> bool:
        return any(_equal(value, old) for value in attributes.values())

    whole, sizes = any(known(old) for old, _ in _whole_pairs(change)), _size_pairs(change)
    return whole or holds_by_name(attributes, change) or (bool(sizes) and all(known(old) for old, _ in sizes))


def _size_pairs(change: Change) -> set[tuple[int, int]]:
    _, _, before, after = change
    olds, news = (x if isinstance(x, (list, tuple)) else [x] for x in (before, after))
    return {(a, b) for a, b in zip(olds, news, strict=False) if isinstance(a, int) and a != b}


def _whole_pairs(change: Change) -> list[tuple[Any, Any]]:
    _, name, before, after = change
    if not isinstance(before, list) or not all(isinstance(size, int) for size in before + after):
        return []
    whole: list[tuple[Any, Any]] = [(tuple(before), tuple(after))]
    return [*whole, (sum(before), sum(after))] if name == "split_sizes" else whole


def _equal(value: object, old: object) -> bool:
    if isinstance(old, tuple):
        return isinstance(value, (list, tuple)) and tuple(value) == old
    return isinstance(value, int) and not isinstance(value, bool) and value == old


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
