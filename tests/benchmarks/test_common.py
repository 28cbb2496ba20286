"""Two runs of a benchmark that share a folder do not do the same work."""

from pathlib import Path

from common import claimed


def test_what_one_run_is_at_another_one_leaves_until_it_is_done(tmp_path: Path):
    file = tmp_path / "locks" / "some search"
    with claimed(file) as first, claimed(file) as second, claimed(file.with_name("another")) as other:
        assert (first, second, other) == (True, False, True)
    with claimed(file) as again:
        assert again
