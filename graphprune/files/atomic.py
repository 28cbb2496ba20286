"""Files appear whole or not at all: they are written in a folder beside their place and moved there at the end."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphprune.errors import InputError


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).splitlines()[0]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(stage: Path, folder: Path) -> None:
    """Move the files of `stage` into `folder`, in the order of their names, once all of them are on the disk."""
    files = sorted(stage.iterdir())
    for file in files:
        _sync(file)
    for file in files:
        os.replace(file, folder / file.name)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and its entries need no flush of their own
        _sync(folder)


@contextmanager
def staging(folder: str | Path) -> Iterator[Path]:
    """A temporary folder inside `folder` (made if need be); its files move to `folder` when the block ends well.

    When the block or the disk fails, what `folder` held before stays as it was and the temporary folder goes. Raises
    InputError, one line, when the files cannot be written (a full disk, no permission).
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".graphprune-", dir=target, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
            _publish(Path(temporary), target)
    except OSError as error:
        raise InputError(f"cannot write to {target}: {_reason(error)}; older files there are unchanged") from error


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path`, whole or not at all. Raises InputError when it cannot be written."""
    path = Path(path)
    with staging(path.parent) as stage:
        (stage / path.name).write_bytes(data)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` as UTF-8, whole or not at all. Raises InputError when it cannot be written."""
    return write_bytes(path, text.encode("utf-8"))
