"""Atomic files: whole or not at all, and the older ones survive."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from graphprune.errors import InputError, StepError
from graphprune.files.atomic import staging, write_bytes, write_text

LIMITED = """
import resource, sys
from graphprune.files.atomic import write_bytes
from graphprune.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_bytes(sys.argv[1], b"x" * 100_000)
except InputError as error:
    print(error)
"""


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for" / "it.bin"
    assert write_bytes(path, b"one") == path
    assert write_text(path, "zwei: ü\n") == path
    assert path.read_bytes() == "zwei: ü\n".encode()
    assert os.listdir(path.parent) == ["it.bin"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    written = write_text(tmp_path / "written", "text")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"older")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write to {tmp_path}: File too large; older files there are unchanged\n"
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_at_the_last_moment(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"older")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(InputError, match="No space left on device"):
        write_bytes(path, b"newer")
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["file"]


def test_all_files_are_on_the_disk_before_the_first_one_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(Path(b).name), replace(a, b))[1])
    with staging(tmp_path) as stage:
        (stage / "b").write_text("2")
        (stage / "a").write_text("1")
    assert events[:4] == ["sync", "sync", "a", "b"]


@pytest.mark.parametrize("error", [StepError("no"), InputError("no"), ValueError("no")])
def test_errors_of_the_block_pass_and_nothing_moves(error: Exception, tmp_path: Path) -> None:
    def fill() -> None:
        with staging(tmp_path) as stage:
            (stage / "file").write_text("half")
            raise error

    with pytest.raises(type(error), match="no"):
        fill()
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="cannot write to"):
        write_text(tmp_path / "file" / "below", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write to"):
        write_text(tmp_path / "folder", "text")
