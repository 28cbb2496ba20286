"""Channels are cut in whole engine blocks."""

from hypothesis import given
from hypothesis import strategies as st

from graphprune.coupling.graph import Site
from graphprune.patterns.filter import Filter


def counts(size: int, block: int, unit: int = 1) -> list[int]:
    site = Site("conv/channels", "channels", size, (), "conv", atom=0, unit=unit)
    return [level.count for level in Filter().levels(site, block)]


def test_three_quarters_half_and_a_quarter() -> None:
    assert counts(64, 16) == [48, 32, 16]
    assert counts(256, 16) == [192, 128, 64]
    assert counts(48, 16) == [32, 16]


def test_fewer_levels_where_blocks_are_large() -> None:
    assert counts(32, 16) == [16]
    assert counts(40, 16) == [32, 16]
    assert counts(17, 16) == [16]
    assert counts(16, 16) == []
    assert counts(8, 16) == []


def test_a_unit_of_several_rows() -> None:
    assert counts(8, 16, unit=4) == [4]
    assert counts(8, 16, unit=16) == [6, 4, 2]
    assert counts(8, 16, unit=32) == [6, 4, 2]
    assert counts(64, 16, unit=3) == [48, 32, 16], "3 rows fill whole blocks only 16 at a time"


@given(st.integers(2, 600), st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 12))
def test_whole_blocks_and_as_near_to_the_share_as_blocks_allow(size: int, block: int, unit: int) -> None:
    found = counts(size, block, unit)
    whole = [count for count in range(1, size) if count * unit % block == 0]
    assert found == sorted(set(found), reverse=True)
    assert set(found) <= set(whole)
    assert bool(found) == bool(whole)
    for share in (0.75, 0.5, 0.25) if whole else ():
        nearest = min(abs(count - share * size) for count in whole)
        assert min(abs(count - share * size) for count in found) == nearest


def test_the_level_says_how_many_stay() -> None:
    site = Site("conv/channels", "channels", 64, (), "conv", atom=3)
    assert [level.name for level in Filter().levels(site, 32)] == ["32 of 64"]
    assert Filter().rewrite(site, (1, 5)).keep[3].tolist() == [1, 5]
