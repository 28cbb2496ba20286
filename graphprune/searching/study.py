"""The append-only store of the trials of one task: an Optuna study, so that Optuna's dashboard opens it."""

import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from math import inf, isfinite
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from graphprune.errors import InputError, StepError
from graphprune.plan import Plan
from graphprune.record import Record, Share
from graphprune.searching.storage import connect, one_line, sqlite_file, storage_url

FORMAT = 1
DENSE = "dense"
ATTACHMENT = "attached"
NAME_LENGTH = 512
"""Optuna's longest name of a parameter; a site with a longer name is stored, but is no column of the dashboard."""

Options = Mapping[str, Sequence[str]]
"""Site -> the labels of what may be done there."""


def label(pattern: str, level: str) -> str:
    """How a choice is named in the dashboard."""
    return f"{pattern} {level}".strip()


@dataclass(frozen=True)
class Summary:
    """One study at a glance: the best feasible record's accuracy and latency share, and when the last trial ended."""

    name: str
    trials: int
    failures: int
    accuracy: float | None
    latency: float | None
    date: datetime | None


class Study:
    """Records of one task, in the order in which they came. Several processes may write to it at the same time."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._distributions = {
            site: CategoricalDistribution(labels) for site, labels in study.user_attrs["options"].items()
        }
        self._records: list[Record] = []
        self._by_plan: dict[Plan, list[Record]] = {}
        self._trials_read = 0

    @classmethod
    def open(cls, storage: str | Path | None, name: str, options: Options | None = None) -> Self:
        """Open the study `name`, or make it.

        `storage` is a path (an SQLite file), an Optuna storage URL, or None for memory. `options` gives the labels
        that a trial may hold at each site; they become columns of the dashboard, and what they are is fixed when the
        study is made, because Optuna allows no parameter to change its choices. Raises InputError, one line, for a
        storage that cannot be opened, and for a study of another program or format.
        """
        backend = connect(storage)
        with one_line(f"cannot open study {name!r}", InputError):
            study = optuna.create_study(
                storage=backend, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
            )
            made_by = study.user_attrs.get("graphprune")
            if made_by is None and study.get_trials(deepcopy=False):
                raise InputError(f"study {name!r} was not made by graphprune")
            if made_by is None:
                study.set_metric_names(["accuracy", "latency share"])
                study.set_user_attr("options", _with_dense(options or {}))
                study.set_user_attr("graphprune", FORMAT)
            elif made_by != FORMAT:
                raise InputError(f"study {name!r} has format {made_by!r}, this version reads {FORMAT}")
        return cls(study)

    def add(self, record: Record) -> None:
        """Store a record as one finished trial, all of it or nothing. Raises StepError when it cannot be stored."""
        params = self._params(record.plan)
        trial = optuna.trial.create_trial(
            state=TrialState.COMPLETE if _succeeded(record) else TrialState.FAIL,
            values=[record.accuracy, _latency(record)] if _succeeded(record) else None,  # type: ignore[list-item]
            params=params,
            distributions={site: self._distributions[site] for site in params},
            user_attrs=_attributes(record),
        )
        with one_line("cannot store a trial", StepError):
            self._study.add_trial(trial)

    def find(self, plan: Plan, agent: str = "", seed: int = 0) -> Record | None:
        """The record of an identical plan, a failed one too; None if the plan was never tried.

        What this agent got with this seed comes first, so that a search that goes on sees what it saw before; then one
        that compared outputs, one over all images, and one that was given up.
        """
        if not any(record.compared and not record.images for record in self._by_plan.get(plan, [])):
            self._refresh()
        known = self._by_plan.get(plan, [])

        def order(record: Record) -> tuple[bool, bool, bool]:
            return (record.agent, record.seed) != (agent, seed), not record.compared, record.images > 0

        return min(known, key=order, default=None)

    def verified(self, plan: Plan) -> Share | None:
        """What the verification of a plan measured before."""
        stored = self._study.user_attrs.get(_verification(plan))
        return None if stored is None else Record.from_json(stored).measured

    def keep_verified(self, record: Record) -> None:
        """Store what a verification measured, so that a search that goes on ends the same way."""
        with one_line("cannot store a verification", StepError):
            self._study.set_user_attr(_verification(record.plan), record.to_json())

    def attachment(self, name: str) -> bytes | None:
        """What was attached under a name, else None. Raises InputError if it cannot be read."""
        stored = self._study.user_attrs.get(f"{ATTACHMENT} {name}")
        if stored is None:
            return None
        try:
            return zlib.decompress(b64decode(stored, validate=True))
        except (TypeError, ValueError, zlib.error) as error:
            raise InputError(f"the {name} of study {self._study.study_name!r} cannot be read: {error}") from None

    def attach(self, name: str, data: bytes) -> None:
        """Keep some bytes with the study, in place of those of the same name.

        They lie in the database itself, so that a study stays one file, or one URL that many machines share.
        """
        with one_line(f"cannot attach the {name} to the study", StepError):
            self._study.set_user_attr(f"{ATTACHMENT} {name}", b64encode(zlib.compress(data, 9)).decode())

    def records(self) -> list[Record]:
        """All records in order, those of other processes too. Raises InputError for one that cannot be read."""
        self._refresh()
        return list(self._records)

    def summary(self) -> Summary:
        """The study at a glance."""
        records = self.records()
        feasible = [record for record in records if record.feasible and _succeeded(record)]
        best = max(feasible, key=lambda record: record.rank, default=None)
        ends = [trial.datetime_complete for trial in self._study.get_trials(deepcopy=False)]
        return Summary(
            name=self._study.study_name,
            trials=len(records),
            failures=sum(not _succeeded(record) for record in records),
            accuracy=best.accuracy if best else None,
            latency=_latency(best) if best and isfinite(_latency(best)) else None,
            date=max((end for end in ends if end), default=None),
        )

    def _params(self, plan: Plan) -> dict[str, str]:
        """The label at each site that is a column; a label that the column does not know is left out."""
        chosen = {choice.site: label(choice.pattern, choice.level) for choice in plan.choices}
        labels = {site: chosen.get(site, DENSE) for site in self._distributions}
        return {site: text for site, text in labels.items() if text in self._distributions[site].choices}

    def _refresh(self) -> None:
        with one_line(f"cannot read study {self._study.study_name!r}", InputError):
            trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        for trial in trials[self._trials_read :]:
            record = _record(trial)
            self._records.append(record)
            self._by_plan.setdefault(record.plan, []).append(record)
        self._trials_read = len(trials)


def list_studies(storage: str | Path) -> list[Summary]:
    """A summary of each graphprune study in the storage, by name. Raises InputError if there is no such storage."""
    file = sqlite_file(storage_url(storage))
    if file is not None and not file.exists():
        raise InputError(f"there is no study store {file}")
    backend = connect(storage)
    with one_line("cannot list the studies", InputError):
        names = sorted(optuna.get_all_study_names(backend))
        studies = [optuna.load_study(study_name=name, storage=backend) for name in names]
        ours = [study for study in studies if "graphprune" in study.user_attrs]
    return [Study(study).summary() for study in ours]


def _verification(plan: Plan) -> str:
    """The name under which a plan's verification is stored."""
    return f"verified {sha256(plan.to_json().encode()).hexdigest()[:16]}"


def _with_dense(options: Options) -> dict[str, list[str]]:
    return {
        site: [DENSE, *(text for text in dict.fromkeys(labels) if text != DENSE)]
        for site, labels in options.items()
        if len(site) <= NAME_LENGTH
    }


def _succeeded(record: Record) -> bool:
    return record.error is None and record.accuracy is not None and isfinite(record.accuracy)


def _latency(record: Record) -> float:
    """The measured share of the dense model's time, else the predicted one; infinite where neither is known."""
    return record.measured.value if record.measured else record.predicted.get("latency", inf)


def _attributes(record: Record) -> dict[str, Any]:
    """The whole record, and beside it what a person wants to see in the dashboard."""
    shown = {"agent": record.agent, "seed": record.seed, "feasible": record.feasible, "error": record.error}
    return {"record": record.to_json(), **{name: value for name, value in shown.items() if value is not None}}


def _record(trial: FrozenTrial) -> Record:
    try:
        return Record.from_json(trial.user_attrs["record"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"trial {trial.number} of the study holds no record that can be read: {error}") from None
