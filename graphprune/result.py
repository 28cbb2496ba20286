"""What a search or a fine-tuning returns."""

from dataclasses import dataclass, field

from torch import nn

from graphprune.coupling.graph import ModelGraph
from graphprune.plan import Plan
from graphprune.record import Record
from graphprune.target import Target


@dataclass(frozen=True)
class Result:
    """The pruned model and all that is known about it.

    `record` describes `model`, `dense_record` the model before; `records` are all trials of the search in order, and
    `searched` is what it ended with: `record` before any fine-tuning, repaired with more effort than the trials.
    `spec` is the spec string of the dense model, empty for a module the user built. `met` says whether the measured
    (or counted) value meets the target; `notes` are lines for people (a fallback taken, a figure missed).
    `rivals` holds the best records of other agents on the same problem, by agent name.
    """

    model: nn.Module
    dense: nn.Module
    graph: ModelGraph
    plan: Plan
    record: Record
    dense_record: Record
    target: Target
    records: tuple[Record, ...] = ()
    spec: str = ""
    met: bool = True
    notes: tuple[str, ...] = ()
    history: tuple[tuple[int, float, float], ...] = ()
    """Fine-tuning: (epoch, training loss, validation accuracy)."""
    rivals: dict[str, Record] = field(default_factory=dict)
    searched: Record | None = None
    study: str = ""
    """Where all trials are stored (an Optuna storage URL), empty when they were kept in memory."""
