"""What can be chosen about a built-in task."""

from dataclasses import dataclass, fields
from typing import Any, Self

from graphprune.errors import InputError


@dataclass(frozen=True)
class Options:
    """How the images of a task become inputs, and how many of them calibrate and validate.

    None means the task's own default. `image_size` is the height and width of inputs in pixels; `mean` and `std` are
    per channel, for pixels in [0, 1]; `calibration` and `validation` are numbers of images; `seed` picks the slices.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    batch_size: int = 128
    calibration: int | None = None
    validation: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "calibration", "validation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"task option {name} must be at least 1, not {value}")
        if self.std is not None and min(self.std) <= 0:
            raise InputError(f"task option std must be positive, not {self.std}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise InputError(f"task option {name} needs one value per channel (3), not {len(value)}")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Options from keywords. Raises InputError for a name that is not one."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise InputError(f"unknown task option {unknown[0]!r}: expected {', '.join(known)}")
        return cls(**values)
