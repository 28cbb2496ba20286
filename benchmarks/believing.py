"""How well what an agent believes after some plans foretells the next ones, offline, from finished searches.

    python benchmarks/believing.py --work convergence_work [--models resnet20,resnet56,vit]

WORK holds the studies of `convergence.py`. Of each search with enough plans that were judged on all images, by
whichever agent, the belief gets the first 6, 8, ... in their order and predicts the merits of the next 12, which the
agent chose by what it had learnt itself. The ways to believe differ in what rewards gain where the table's error falls
by a factor of e (fitted to the records, or known to be 1, since the merit is a logarithm), and in the spreads of the
layers' weights among which the likelihood chooses. Printed are means over a search: Spearman's rank correlation, the
root mean square error, and the mean logarithm of the density that the belief has for what came (nats; more is better).
Nothing is evaluated. Writes `results/believing.json`.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import RESULTS
from numpy.typing import NDArray
from scipy.stats import spearmanr

from graphprune.agents import belief as beliefs
from graphprune.agents.autosculpt import merit
from graphprune.agents.belief import Belief
from graphprune.past import Past, read_past
from graphprune.problem import Floats

AFTER = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 100, 120)
"""Numbers of plans that are known."""
NEXT = 12
FEWEST = 60
"""Plans of a search that is looked at."""
NARROW, WIDE = (0.5, 1.0, 2.0), (1.0, 2.0, 4.0, 8.0)
Way = tuple[float | None, tuple[float, ...]]
WAYS: dict[str, Way] = {
    "fitted slope, spreads to 2": (None, NARROW),
    "fitted slope, spreads to 8": (None, WIDE),
    "slope 1, spreads to 2": (1.0, NARROW),
    "slope 1, spreads to 8": (1.0, WIDE),
}
Vectors = NDArray[np.int64]
Line = dict[str, Any]


def searches(past: Past) -> dict[str, tuple[Vectors, Floats]]:
    """The plans [N, sites] of each search and their merits [N], in order."""
    found = defaultdict[str, list[tuple[tuple[int, ...], float]]](list)
    for choices, record in past.judged:
        if record.accuracy is not None and not record.images and past.problem.feasible(choices):
            search = f"{record.agent} seed {record.seed}"
            found[search].append((choices, merit(past.problem, record, choices)))
    return {
        name: (np.array([choices for choices, _ in own]), np.array([value for _, value in own]))
        for name, own in found.items()
        if len(own) >= FEWEST
    }


def foretold(past: Past, plans: Vectors, merits: Floats, way: Way) -> list[dict[str, float]]:
    """What a way to believe makes of each next `NEXT` plans."""
    slope, spreads = way
    found = []
    for known in (count for count in AFTER if count + NEXT <= len(plans)):
        with patch.object(beliefs, "SPREADS", spreads):
            belief = Belief(past.problem, slope=slope)
            belief.learn(plans[:known], merits[:known])
        came = merits[known : known + NEXT]
        mean, deviation = belief.predict(plans[known : known + NEXT])
        fit = belief._fit
        assert fit is not None
        variance = deviation**2 + fit.setting[2] * fit.scale**2
        found.append(
            {
                "known": known,
                "rank": float(spearmanr(mean, came).statistic),
                "error": float(np.sqrt(np.mean((came - mean) ** 2))),
                "density": float(-0.5 * np.mean((came - mean) ** 2 / variance + np.log(2 * np.pi * variance))),
            }
        )
    return found


def table(lines: Sequence[Line]) -> str:
    """Means over each search, the ways beside each other."""
    text = [f"{'':34}" + "".join(f"{way:>30}" for way in WAYS)]
    for line in lines:
        cells = []
        for way in WAYS:
            rows = line["ways"][way]
            rank, error, density = (np.nanmean([row[name] for row in rows]) for name in ("rank", "error", "density"))
            cells.append(f"{rank:14.2f}{error:8.3f}{density:8.2f}")
        text.append(f"{line['model']:10}{line['search']:24}" + "".join(cells))
    return "\n".join(text)


def main() -> None:
    """All searches of all studies."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder with the studies of convergence.py")
    made.add_argument("--models", default="resnet20,resnet56,vit")
    options = made.parse_args()
    lines = []
    for model in options.models.split(","):
        for past in read_past(options.work / f"{model}.db"):
            for search, (plans, merits) in searches(past).items():
                ways = {name: foretold(past, plans, merits, way) for name, way in WAYS.items()}
                lines.append({"model": model, "search": search, "plans": len(plans), "ways": ways})
    print(table(lines))
    (RESULTS / "believing.json").write_text(json.dumps({"searches": lines}) + "\n")


if __name__ == "__main__":
    main()
