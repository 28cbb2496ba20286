"""A plan says what is cut where. It is frozen, hashable, and its JSON is byte-stable."""

import json
from dataclasses import asdict, dataclass
from typing import Self

from graphprune.errors import InputError

FORMAT = 1


@dataclass(frozen=True, order=True)
class Choice:
    """One decision: at `site`, `pattern` at `level` keeps the units `keep`.

    `keep` holds sorted unit indices: channels, heads or hidden units of a group, or positions
    (row * kernel width + column) of a kernel; where filters differ, filter * positions + position, or filter * 4 +
    quarter of the channels; it is empty where a branch is dropped. It is fully resolved: applying a plan needs no
    scores and no data.
    """

    site: str
    pattern: str
    level: str
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if list(self.keep) != sorted(set(self.keep)) or (self.keep and self.keep[0] < 0):
            raise InputError(f"the units kept at {self.site!r} must be sorted, without repeats, none below 0")


@dataclass(frozen=True)
class Plan:
    """The choices of one model, sorted by site. Sites that stay dense are not listed.

    `model` is the signature of the graph the plan was made for (`ModelGraph.signature`); `inputs` are the dtype and
    the shape, without the batch axis, of each input of that model, so that it can be traced again.
    """

    model: str
    choices: tuple[Choice, ...] = ()
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(sorted(self.choices)))
        sites = [choice.site for choice in self.choices]
        for site in sites:
            if sites.count(site) > 1:
                raise InputError(f"the plan decides {site!r} twice")

    def to_json(self) -> str:
        """The plan as JSON text; equal plans give equal bytes."""
        body = {"format": FORMAT, "model": self.model, "choices": [asdict(choice) for choice in self.choices]}
        body["inputs"] = self.inputs
        return json.dumps(body, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan back. Raises InputError for anything that is not one."""
        try:
            body = json.loads(text)
            if body["format"] != FORMAT:
                raise InputError(f"plan format {body['format']!r} is not known to this version (it reads {FORMAT})")
            choices = tuple(
                Choice(str(c["site"]), str(c["pattern"]), str(c["level"]), tuple(int(i) for i in c["keep"]))
                for c in body["choices"]
            )
            inputs = tuple((str(dtype), tuple(int(n) for n in shape)) for dtype, shape in body["inputs"])
            return cls(str(body["model"]), choices, inputs)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"not a graphprune plan: {error}") from None
