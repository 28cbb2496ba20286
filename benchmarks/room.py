"""What the room is worth that a search's plan leaves to its target.

    python benchmarks/room.py --data DIR --weights DIR [--models resnet20] [--results FILE]

A search aims at what it predicts, and whole models are faster or slower than predicted: by an eighth from one hour to
the next on a virtual machine. Where a plan that is verified leaves room, it is cut less (`verification.py`). Here the
plans that the searches of FILE returned, which `convergence.py` wrote, are verified again, before and after that, and
both are judged on images that no search has seen. Run it with nothing beside it.

Resumable: a plan is a line in WORK/room.jsonl. Writes `results/room-<engine>-1t-<processor>.json` with all samples.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import prepared, raw, result_file, trained_parser
from equal_latency import Rows
from unseen import facts, plan_of, unseen

from graphprune.machine import environment
from graphprune.record import Record
from graphprune.searching.search import Session
from graphprune.searching.verification import Verification, Verified
from graphprune.tasks.task import Task

LATENCY = 0.5
Line = dict[str, Any]
"""A search by its `facts`; `before` and `after` its room is used: latency, accuracy on seen and unseen images."""


def arguments() -> argparse.Namespace:
    """The command line."""
    made = trained_parser(__doc__, "resnet20,resnet56")
    made.add_argument("--results", type=Path, default=result_file("convergence"), help="what convergence.py wrote")
    made.add_argument("--agents", default="autosculpt,dp+local,dp", help="whose plans")
    made.add_argument("--images", type=int, default=1000, help="validation images of the searches")
    made.add_argument("--work", type=Path, default=Path("room_work"), help="folder for what is judged already")
    return made.parse_args()


def room(session: Session, line: Line, others: Task) -> Line:
    """A search's plan verified, and what becomes of it where it leaves room; `others` is a task of unseen images."""
    plan = plan_of(line)
    problem = session.pose(line["agent"], 1, line["seed"])
    verification = Verification(session, problem, problem.evaluator, line["agent"])
    predicted = verification.evaluator.blank(session.choices(plan)).predicted
    found = verification.attempt(Record(plan, predicted=predicted))
    assert found is not None, verification.failures
    first = verification.judged(found)
    last = verification.loosened(first) if first.holds else first
    return facts(line) | {"before": outcome(first, others), "after": outcome(last, others)}


def outcome(found: Verified, others: Task) -> Line:
    """What is published of a plan."""
    record, measured = found.record, found.record.measured
    assert measured is not None
    return {
        "plan": json.loads(record.plan.to_json()), "predicted": record.predicted["latency"],
        "latency": [measured.value, measured.low, measured.high], "seen": record.accuracy,
        "deviation": record.deviation, "unseen": others.accuracy(found.module), **raw(measured),
    }  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    """A row for each search: latency, accuracy on seen and on unseen images, before -> after."""
    text = [f"{'model':10} {'agent':20} {'seed':>4}   {'latency':18} {'seen':20} {'unseen':20}"]
    for line in lines:
        before, after = line["before"], line["after"]
        cells = [f"{before['latency'][0]:.3f} -> {after['latency'][0]:.3f}"]
        cells += [f"{before[name]:.1%} -> {after[name]:.1%}" for name in ("seen", "unseen")]
        text.append(
            f"{line['model']:10} {line['agent']:20} {line['seed']:4}   {cells[0]:18} {cells[1]:20} {cells[2]:20}"
        )
    return "\n".join(text)


def main() -> None:
    """Verify what is not there yet."""
    options = arguments()
    kept = Rows(options.work / "room.jsonl")
    searches = [line for line in json.loads(options.results.read_text())["searches"] if line["met"]]
    for model in options.models.split(","):
        own = [line for line in searches if line["model"] == model and line["agent"] in options.agents.split(",")]
        missing = [line for line in own if not kept.has(**facts(line))]
        if missing:
            session = prepared(model, options, LATENCY)
            others = unseen(session.task, options.data)
        for line in missing:
            kept.add(room(session, line, others))
            print(table(kept.rows[-1:]).splitlines()[1], flush=True)
    body = {"latency": LATENCY, "searches": kept.rows, "environment": environment()}
    result_file("room").write_text(json.dumps(body) + "\n")
    print(table(kept.rows))


if __name__ == "__main__":
    main()
