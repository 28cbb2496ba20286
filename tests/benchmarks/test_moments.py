"""What is told of measurements in quiet and other moments."""

from typing import Any

from moments import told


def line(kind: str, share: float, dense: float, took: float = 0.5) -> dict[str, Any]:
    return {"kind": kind, "share": share, "dense": dense, "took": took}


def test_quiet_moments_are_told_from_others() -> None:
    shares = [(0.44, 1.0e-3), (0.46, 1.05e-3), (0.50, 1.2e-3), (0.54, 1.3e-3)]
    lines = [line("as it comes", *pair) for pair in shares]
    lines += [line("stopwatch", 0.45, 1.01e-3, took) for took in (0.2, 0.4, 6.0)]
    text = [" ".join(row.split()) for row in told(lines).splitlines()]
    assert text == [
        "dense model: 1.00 ms at its fastest",
        "as it comes 4 times 0.485, sd 0.044, 0.440 to 0.540",
        "stopwatch 3 times 0.450, sd 0.000, 0.450 to 0.450",
        "in quiet moments 5 times 0.450, sd 0.007, 0.440 to 0.460",
        "in other moments 2 times 0.520, sd 0.028, 0.500 to 0.540",
        "a measurement by stopwatch took 0.4 s in the median, 6.0 s at most",
    ]
