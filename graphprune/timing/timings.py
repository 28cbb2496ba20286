"""The machine-wide file of measured operator times: JSON lines, appended to, never rewritten."""

import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphprune.timing.passes import PASSES, Samples


def default_cache_path() -> Path:
    """`timings.jsonl` in the folder $GRAPHPRUNE_CACHE, or else in this platform's folder for caches."""
    if folder := os.environ.get("GRAPHPRUNE_CACHE"):
        return Path(folder) / "timings.jsonl"
    fallback = {"Darwin": Path.home() / "Library" / "Caches", "Windows": Path.home() / "AppData" / "Local"}
    variable = "LOCALAPPDATA" if platform.system() == "Windows" else "XDG_CACHE_HOME"
    base = os.environ.get(variable) or fallback.get(platform.system(), Path.home() / ".cache")
    return Path(base) / "graphprune" / "timings.jsonl"


@dataclass(frozen=True)
class TimingFile:
    """Operator times of one scope (engine, machine, method) in a file that many processes and scopes share.

    A line is written in one piece at the end of the file, so that processes do not disturb each other; a line cut
    short by a kill or a full disk is skipped on reading and costs nothing but its own measurement.
    """

    path: Path
    scope: str

    def read(self) -> dict[str, Samples]:
        """All entries of this scope by operator key; of several, the last. An absent file has none."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            warnings.warn(f"the timing cache {self.path} cannot be read ({error.strerror}); measuring anew")
            return {}
        return dict(entry for line in lines if (entry := self._parse(line)) is not None)

    def append(self, entries: Mapping[str, Samples]) -> None:
        """Add the entries. Where they cannot be written, a warning says so: a cache is no reason to fail."""
        lines = [
            json.dumps({"scope": self.scope, "operator": key, "samples": samples}) for key, samples in entries.items()
        ]
        # The newline in front ends whatever an interrupted writer may have left.
        data = ("\n" + "\n".join(lines) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(data)
        except OSError as error:
            warnings.warn(f"the timing cache {self.path} cannot be written ({error.strerror}); timings are not kept")

    def _parse(self, line: bytes) -> tuple[str, Samples] | None:
        try:
            entry = json.loads(line)
            if entry["scope"] != self.scope:
                return None
            samples = tuple(float(sample) for sample in entry["samples"])
            usable = len(samples) >= PASSES and all(0 < sample < math.inf for sample in samples)
            return (str(entry["operator"]), samples) if usable else None
        except (ValueError, KeyError, TypeError):
            return None
