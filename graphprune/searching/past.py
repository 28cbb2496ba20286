"""What earlier searches left in a study: their problems, and the plans that were judged, by whichever agent."""

from dataclasses import dataclass
from pathlib import Path

from graphprune.errors import InputError
from graphprune.files.layout import STUDY
from graphprune.plan import Plan
from graphprune.record import Record
from graphprune.searching.problem import Choices, Problem
from graphprune.searching.problem_file import unpack
from graphprune.searching.study import Study, list_studies

PROBLEM = "problem"
"""The attachment of a study that holds the problem of its newest search."""


@dataclass(frozen=True)
class History:
    """What an agent takes from earlier searches; each may be used alone.

    `study` is a folder that `prune` wrote, an SQLite file, or a storage URL. `transfer` starts from what was recorded
    there, `augment` from what can be imagined on the problems there; both need `study`. `assistant` predicts what a
    plan is worth from the records so far, and needs nothing. Raises InputError for a boost without its study, and for
    a study without any boost that reads it.
    """

    study: str | Path | None = None
    transfer: bool = False
    augment: bool = False
    assistant: bool = False

    def __post_init__(self) -> None:
        reads = self.transfer or self.augment
        if reads and self.study is None:
            raise InputError("transfer and augmented transfer need the study of an earlier search")
        if self.study is not None and not reads:
            raise InputError("a study of earlier searches is given, but neither transfer nor augmented transfer")


@dataclass(frozen=True, eq=False)
class Past:
    """An earlier search: its problem, which cannot be evaluated any more, and what plans turned out to be."""

    name: str
    problem: Problem
    judged: tuple[tuple[Choices, Record], ...]


def read_past(storage: str | Path) -> tuple[Past, ...]:
    """The past of every task in a study store. Raises InputError if there is no store, or no problem in it."""
    store = Path(storage) / STUDY if Path(storage).is_dir() else storage
    found = []
    for summary in list_studies(store):
        study = Study.open(store, summary.name)
        packed = study.attachment(PROBLEM)
        if packed is not None:
            found.append(_past(summary.name, unpack(packed), study.records()))
    if not found:
        raise InputError(f"no search in {store} left a problem to learn from")
    return tuple(found)


def _past(name: str, problem: Problem, records: list[Record]) -> Past:
    """Records of plans that the problem does not know (made with other patterns) are left out."""
    known = ((choices_of(problem, record.plan), record) for record in records)
    return Past(name, problem, tuple((choices, record) for choices, record in known if choices is not None))


def choices_of(problem: Problem, plan: Plan) -> Choices | None:
    """The choice vector of a plan; None if the plan is of another model or holds what the problem does not offer."""
    wanted = {choice.site: (choice.pattern, choice.level, choice.keep) for choice in plan.choices}
    sites = {decision.site for decision in problem.decisions}
    if plan.model != problem.model or not wanted.keys() <= sites:
        return None
    vector = []
    for decision in problem.decisions:
        offered = {(option.pattern, option.level, option.keep): n for n, option in enumerate(decision.options)}
        vector.append(offered.get(wanted[decision.site]) if decision.site in wanted else 0)
    return None if None in vector else tuple(vector)  # type: ignore[arg-type]
