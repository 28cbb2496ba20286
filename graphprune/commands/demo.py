"""`demo`: the whole job on data that comes with the installation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from graphprune.commands import base, outcome
from graphprune.commands.base import Answer, Verb
from graphprune.commands.console import Bars


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Train a small ResNet on scanned digits, prune it with the AutoSculpt agent and prove the speed-up.

    Takes some minutes on two cores and needs no network. Ends with a table of accuracy, latency measured in ONNX
    Runtime (one thread, batch 1), FLOPs and parameters, and the same target reached by other agents. DIR then holds
    both models as ONNX, the pruned one's weights and plan, and report.html.
    """

    stopped: ClassVar[str] = "stopped; every finished trial is kept: give the same command again to go on from there"

    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("demo")
    trials: Annotated[int, typer.Option(metavar="N", help="Plans that each agent may evaluate.", min=1)] = 12
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything that is random.")] = 0

    def run(self) -> Answer:
        """Run the demo."""
        from graphprune.commands import digits_demo

        settings = digits_demo.Settings(self.trials, seed=self.seed)
        with Bars() as bars:
            shown = digits_demo.run(self.out, settings, base.engine("onnxruntime", threads=1), bars)
        answer = outcome.answer(shown.delivery, shown.scores)
        return outcome.with_rivals(answer, shown.delivery, shown.found)
