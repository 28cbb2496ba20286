"""Plans: byte-stable JSON, and one clear line for what is not a plan."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import InputError
from graphprune.plan import Choice, Plan

PLAN = Plan(
    "0f3a",
    (Choice("layer1.conv1/kernel", "kernel", "left", (0, 3, 6)), Choice("conv1/channels", "filter", "1/2", (0, 2))),
    (("float32", (3, 32, 32)), ("int64", ())),
)
TEXT = """{
 "choices": [
  {
   "keep": [
    0,
    2
   ],
   "level": "1/2",
   "pattern": "filter",
   "site": "conv1/channels"
  },
  {
   "keep": [
    0,
    3,
    6
   ],
   "level": "left",
   "pattern": "kernel",
   "site": "layer1.conv1/kernel"
  }
 ],
 "format": 1,
 "inputs": [
  [
   "float32",
   [
    3,
    32,
    32
   ]
  ],
  [
   "int64",
   []
  ]
 ],
 "model": "0f3a"
}
"""

names = st.text(min_size=1, max_size=12)
keeps = st.sets(st.integers(0, 5000), min_size=1, max_size=20).map(lambda kept: tuple(sorted(kept)))
choices = st.builds(Choice, names, names, names, keeps)
plans = st.builds(
    Plan,
    names,
    st.lists(choices, max_size=5, unique_by=lambda choice: choice.site).map(tuple),
    st.lists(st.tuples(st.sampled_from(["float32", "int64"]), st.lists(st.integers(1, 999)).map(tuple))).map(tuple),
)


def test_the_bytes_of_a_plan_are_fixed() -> None:
    assert PLAN.to_json() == TEXT


def test_bytes_do_not_depend_on_the_process() -> None:
    code = "import sys; from graphprune.plan import Plan; print(Plan.from_json(sys.stdin.read()).to_json(), end='')"
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], input=TEXT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == TEXT


@given(plans)
def test_round_trip(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()


@given(plans, st.randoms(use_true_random=False))
def test_the_order_of_choices_is_no_part_of_a_plan(plan: Plan, random: object) -> None:
    shuffled = list(plan.choices)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert Plan(plan.model, tuple(shuffled), plan.inputs).to_json() == plan.to_json()


@pytest.mark.parametrize("keep", [(2, 1), (1, 1), (-1, 0)])
def test_a_choice_keeps_sorted_units(keep: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="'conv1'"):
        Choice("conv1", "filter", "1/2", keep)


def test_a_site_is_decided_once() -> None:
    with pytest.raises(InputError, match="decides 'a' twice"):
        Plan("m", (Choice("a", "filter", "1/2", (0,)), Choice("a", "kernel", "left", (0,))))


def _without(field: str) -> str:
    return json.dumps({key: value for key, value in json.loads(TEXT).items() if key != field})


def _with(field: str, value: object) -> str:
    return json.dumps(json.loads(TEXT) | {field: value})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        *map(_without, ("format", "model", "choices", "inputs")),
        _with("choices", 3),
        _with("choices", [3]),
        _with("choices", [{"site": "a", "pattern": "filter", "level": "1/2"}]),
        _with("choices", [{"site": "a", "pattern": "filter", "level": "1/2", "keep": ["x"]}]),
        _with("inputs", [["float32"]]),
        _with("inputs", [["float32", ["x"]]]),
    ],
)
def test_what_is_not_a_plan_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan.from_json(text)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_format_names_both_versions() -> None:
    with pytest.raises(InputError, match=r"format 2 is not known .* reads 1"):
        Plan.from_json(_with("format", 2))
