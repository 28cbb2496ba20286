import subprocess
import sys
from pathlib import Path

import pytest

from graphprune.timing.timings import TimingFile, default_cache_path


def test_what_is_appended_is_read_back_and_the_last_entry_wins(tmp_path: Path) -> None:
    file = TimingFile(tmp_path / "new" / "t.jsonl", "a")
    assert file.read() == {}
    file.append({"x": (1.5e-6, 2.5e-6), "y": (0.1 + 0.2, 1.0)})
    file.append({"x": (3e-6, 4e-6, 5e-6)})
    assert file.read() == {"x": (3e-6, 4e-6, 5e-6), "y": (0.1 + 0.2, 1.0)}


def test_scopes_are_apart(tmp_path: Path) -> None:
    for scope, value in (("a", 1.0), ("b", 2.0)):
        TimingFile(tmp_path / "t.jsonl", scope).append({"x": (value, value)})
    assert TimingFile(tmp_path / "t.jsonl", "a").read() == {"x": (1.0, 1.0)}
    assert TimingFile(tmp_path / "t.jsonl", "c").read() == {}


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = TimingFile(tmp_path / "t.jsonl", "a")
    file.append({"x": (1.0, 1.0)})
    with file.path.open("ab") as raw:
        raw.write(b'{"scope": "a", "operator": "y", "samp')
    file.append({"z": (2.0, 2.0)})
    assert file.read() == {"x": (1.0, 1.0), "z": (2.0, 2.0)}


@pytest.mark.parametrize("samples", ["[]", "[1.0]", "[1.0, -1.0]", "[1.0, NaN]", "[1.0, Infinity]", "[0.0, 1.0]", "7"])
def test_times_that_cannot_be_are_not_used(samples: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"scope": "a", "operator": "x", "samples": {samples}}}\n')
    assert TimingFile(path, "a").read() == {}


def test_many_processes_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    code = (
        "import sys; from pathlib import Path; from graphprune.timing.timings import TimingFile\n"
        "file = TimingFile(Path(sys.argv[1]), 'a')\n"
        "for i in range(60): file.append({f'{sys.argv[2]} {i} {j}': (1.0 + j,) * 40 for j in range(20)})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert TimingFile(path, "a").read() == {
        f"{number} {i} {j}": (1.0 + j,) * 40 for number in range(3) for i in range(60) for j in range(20)
    }


def test_a_cache_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        TimingFile(tmp_path / "file" / "t.jsonl", "a").append({"x": (1.0, 1.0)})
    with pytest.warns(UserWarning, match="cannot be read"):
        assert TimingFile(tmp_path, "a").read() == {}


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    assert default_cache_path() == tmp_path / "timings.jsonl"
    monkeypatch.delenv("GRAPHPRUNE_CACHE")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_path() == tmp_path / "xdg" / "graphprune" / "timings.jsonl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_path() == Path.home() / ".cache" / "graphprune" / "timings.jsonl"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert default_cache_path() == Path.home() / "Library" / "Caches" / "graphprune" / "timings.jsonl"
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_cache_path() == tmp_path / "local" / "graphprune" / "timings.jsonl"
