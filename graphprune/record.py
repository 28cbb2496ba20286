"""One evaluated plan, as it is stored: what was predicted, what was measured, or why it failed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from graphprune.plan import Plan


@dataclass(frozen=True)
class Share:
    """A candidate's time / the dense model's: below 1 is faster. 95 % interval, raw samples in seconds."""

    value: float
    low: float
    high: float
    dense: tuple[float, ...]
    candidate: tuple[float, ...]
    engine: str


@dataclass(frozen=True)
class Record:
    """What is known of one plan.

    `accuracy` is the task's metric on the validation slice, in [0, 1]; `deviation` is how far its outputs there are
    from the dense model's (squared, relative to those; 0 is the same); `images` is how many images both are over where
    a hopeless candidate was given up, 0 where they are over all of them; `predicted` are shares of the dense model
    (latency, flops, params); `measured` is there when the plan was exported and run; `flops` (multiply-adds x 2) and
    `params` are counted on the pruned model. A candidate that failed has `error` and no accuracy.
    """

    plan: Plan
    accuracy: float | None = None
    feasible: bool = False
    predicted: Mapping[str, float] = field(default_factory=dict)
    measured: Share | None = None
    flops: int = 0
    params: int = 0
    error: str | None = None
    agent: str = ""
    seed: int = 0
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    images: int = 0
    deviation: float | None = None

    @property
    def compared(self) -> bool:
        """Whether its outputs, if it has any, were compared with the dense model's; once they were not."""
        return self.accuracy is None or self.deviation is not None

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Larger is better: feasible records first, then by accuracy, then the faster; failures come last."""
        latency = self.measured.value if self.measured is not None else self.predicted.get("latency", 1.0)
        return (self.feasible and self.error is None, self.accuracy if self.accuracy is not None else -1.0, -latency)

    def to_json(self) -> str:
        """The record as JSON text, the plan included."""
        body = asdict(self)
        body["plan"] = json.loads(self.plan.to_json())
        return json.dumps(body, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record back."""
        body: dict[str, Any] = json.loads(text)
        body["plan"] = Plan.from_json(json.dumps(body["plan"]))
        if body["measured"] is not None:
            share = body["measured"]
            samples = {name: tuple(share[name]) for name in ("dense", "candidate")}
            body["measured"] = Share(**{**share, **samples})
        return cls(**body)
