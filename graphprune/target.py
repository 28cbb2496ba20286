"""What must hold for the pruned model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from graphprune.errors import InputError

SHARES = ("latency", "flops", "params")
ABSOLUTE = {"latency_ms": ("latency", 1e-3), "flops_g": ("flops", 1e9), "params_m": ("params", 1e6)}
"""Absolute limit -> (the share it bounds, its unit in seconds, FLOPs or parameters)."""


@dataclass(frozen=True)
class Target:
    """Upper bounds for the pruned model; several may be combined.

    `latency`, `flops`, `params` are shares of the dense model in (0, 1]; `latency_ms` (milliseconds),
    `flops_g` (1e9 FLOPs, multiply-adds x 2) and `params_m` (1e6 parameters) are absolute.
    Raises InputError when nothing is asked for or a bound is out of range.
    """

    latency: float | None = None
    flops: float | None = None
    params: float | None = None
    latency_ms: float | None = None
    flops_g: float | None = None
    params_m: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if not given:
            raise InputError("a target needs at least one bound, for example Target(latency=0.5)")
        for name, value in given.items():
            if not value > 0:
                raise InputError(f"target {name} must be positive, not {value}")
            if name in SHARES and value > 1:
                raise InputError(f"target {name} is a share of the dense model, so at most 1, not {value}")

    def shares(self, dense: Mapping[str, float]) -> dict[str, float]:
        """The bounds as shares of the dense model, whose `latency` (seconds), `flops` and `params` are given."""
        bounds: dict[str, float] = {}
        for name in SHARES:
            if (share := getattr(self, name)) is not None:
                bounds[name] = share
        for name, (metric, unit) in ABSOLUTE.items():
            if (limit := getattr(self, name)) is not None:
                bounds[metric] = min(bounds.get(metric, float("inf")), limit * unit / dense[metric])
        return bounds
