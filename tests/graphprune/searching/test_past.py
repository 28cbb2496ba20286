"""Problems and attachments as a study keeps them, and what a later search reads of it."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from typer.testing import CliRunner

from graphprune import cli
from graphprune.commands.prune import Prune
from graphprune.errors import InputError, StepError
from graphprune.plan import Choice
from graphprune.record import Record
from graphprune.searching.past import PROBLEM, History, choices_of, read_past
from graphprune.searching.problem import Problem, Sum
from graphprune.searching.problem_file import FACTS, pack, unpack
from graphprune.searching.study import Study
from tests.agents.toys import feasible_plans, problem, with_branch


def made(seed: int = 0) -> Problem:
    """A toy with a name, two costs, inputs, and a pair of options that excludes itself."""
    toy = problem(seed, sizes=(3, 4, 2), limit=0.6)
    toy.decisions = tuple(
        replace(one, options=tuple(replace(o, keep=tuple(range(n + 1))) for n, o in enumerate(one.options)))
        for one in toy.decisions
    )
    toy.costs = {**toy.costs, "flops": Sum(0.1, toy.costs["latency"].factors)}
    toy.costs["flops"].factors[0].table[1, 1] = np.inf
    toy.model, toy.inputs = f"toy{seed}", (("float32", (3, 8, 8)),)
    return toy


def test_a_problem_comes_back_as_it_was() -> None:
    for toy in (made(), with_branch()):
        back = unpack(pack(toy))
        assert back.decisions == toy.decisions
        assert (back.model, back.inputs, dict(back.limits)) == (toy.model, toy.inputs, dict(toy.limits))
        for name in ("features", "edges", "edge_types"):
            np.testing.assert_array_equal(getattr(back.graph, name), getattr(toy.graph, name))
        for choices in feasible_plans(toy):
            assert back.error(choices) == toy.error(choices)
            assert {n: cost(choices) for n, cost in back.costs.items()} == {
                n: cost(choices) for n, cost in toy.costs.items()
            }
            assert back.plan(choices) == toy.plan(choices)
        assert back.completions == toy.completions


def test_a_stored_problem_cannot_be_evaluated() -> None:
    back = replace(unpack(pack(made())), trials=1)
    with pytest.raises(StepError, match="cannot be evaluated"):
        back.evaluate(back.dense)


def spoiled(change: str, value: object) -> bytes:
    """A packed problem one of whose facts is another."""
    arrays = load(pack(made()))
    facts = json.loads(arrays[FACTS].tobytes())
    place, *rest = change.split(".")
    (facts[place][int(rest[0])] if rest else facts)[rest[1] if rest else place] = value
    arrays[FACTS] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    packed: bytes = save(arrays)
    return packed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04K\x01.", "cannot be read"),
        (save({"x": np.zeros(1)}), "cannot be read"),
        (spoiled("format", 2), "format 2"),
        (spoiled("limits", {"energy": 0.5}), "limit has no cost"),
        (spoiled("decisions.0.node", 99), "no node"),
        (spoiled("decisions.1.options", []), "cannot be read"),
        (spoiled("decisions.1.gone_with", [2]), "depends on a later one"),
        (spoiled("error", {"constant": 0.0, "sites": [[0], [0], [2]]}), "has the shape"),
        (spoiled("error", {"constant": 0.0, "sites": [[7]]}), "cannot be read"),
    ],
)
def test_other_bytes_are_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        unpack(data)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("stored", ["file", None])
def test_attachments_are_replaced_and_seen_by_others(stored: str | None, tmp_path: Path) -> None:
    study = Study.open(tmp_path / "study.db" if stored else None, "task")
    assert study.attachment("a") is None
    study.attach("a", b"first")
    study.attach("b", bytes(range(256)) * 4000)
    study.attach("a", b"second")
    reader = Study.open(tmp_path / "study.db", "task") if stored else study
    assert reader.attachment("a") == b"second"
    assert reader.attachment("b") == bytes(range(256)) * 4000
    assert reader.records() == []


def test_a_damaged_attachment_is_refused_in_one_line(tmp_path: Path) -> None:
    Study.open(tmp_path / "study.db", "task").attach("a", b"data")
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update study_user_attributes set value_json = '\"AAAA\"' where key = 'attached a'")
    database.close()
    with pytest.raises(InputError, match="the a of study 'task' cannot be read") as caught:
        Study.open(tmp_path / "study.db", "task").attachment("a")
    assert len(str(caught.value).splitlines()) == 1


def test_the_past_is_every_task_with_a_problem(tmp_path: Path) -> None:
    toys = [made(0), made(1)]
    plans = [feasible_plans(toy)[5] for toy in toys]
    for toy, plan in zip(toys, plans, strict=True):
        study = Study.open(tmp_path / "study.db", toy.model)
        study.attach(PROBLEM, pack(toy))
        study.add(Record(toy.plan(plan), 0.5, True))
        study.add(Record(replace(toy.plan(plan), choices=(Choice("elsewhere", "a", "b", ()),)), 0.9))
    Study.open(tmp_path / "study.db", "another").add(Record(toys[0].plan(plans[0]), 0.1))
    found = read_past(tmp_path)  # the folder that holds the file
    assert [past.name for past in found] == ["toy0", "toy1"]
    for past, toy, plan in zip(found, toys, plans, strict=True):
        assert past.problem.model == toy.model
        assert [(choices, record.accuracy) for choices, record in past.judged] == [(plan, 0.5)]


def test_choices_are_found_again_by_pattern_and_units() -> None:
    toy = made()
    for choices in feasible_plans(toy):
        assert choices_of(toy, toy.plan(choices)) == choices
    assert choices_of(toy, made(1).plan((1, 0, 0))) is None
    plan = toy.plan((1, 0, 0))
    assert choices_of(toy, replace(plan, choices=(replace(plan.choices[0], keep=(9,)),))) is None


def test_a_store_without_problems_teaches_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no study store"):
        read_past(tmp_path / "none.db")
    Study.open(tmp_path / "study.db", "task").add(Record(made().plan((1, 0, 0)), 0.5))
    with pytest.raises(InputError, match="left a problem"):
        read_past(tmp_path / "study.db")


def test_boosts_need_what_they_read() -> None:
    for boost in ("transfer", "augment"):
        with pytest.raises(InputError, match="need the study"):
            History(**{boost: True})
    with pytest.raises(InputError, match="neither"):
        History(study="study.db", assistant=True)
    assert History(assistant=True).study is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--agent", "amc", "--augment"), "add --transfer STUDY"),
        (("--agent", "amc", "--transfer", "none.db"), "there is no study store"),
        (("--agent", "random", "--assistant"), "the agent 'random' has no setting history"),
    ],
)
def test_the_command_line_refuses_boosts_in_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["prune", "cifar:resnet20", "--data", "digits", "--flops", "0.5", *options]
    outcome = CliRunner().invoke(cli.app, given)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_line_gives_amc_its_history(tmp_path: Path) -> None:
    store = tmp_path / "study.db"
    Study.open(store, "task").attach(PROBLEM, pack(made()))
    verb = Prune(model="m", data="digits", agent="amc", transfer=str(store), augment=True)
    agent = verb._agent()
    assert agent.history == History(str(store), transfer=True, augment=True)  # type: ignore[attr-defined]
    assert replace(verb, transfer=None, augment=False)._agent().history == History()  # type: ignore[attr-defined]
