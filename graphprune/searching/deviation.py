"""How far a candidate's outputs are from the dense model's: a finer measure than the share of right answers.

One image says yes or no about a candidate's answer, but every output says by how much it is off, so that on as many
images this tells alike candidates apart better than their accuracy does (`benchmarks/signals.py`). It needs no labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graphprune.tasks.task import Answers

LARGEST_OUTPUTS = 2**26
"""Elements of the dense outputs that are kept; of larger outputs only those on the first images count."""


def first_outputs(answers: Answers, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a model answers to the first of some batches of inputs, as many as may be kept, but at least one."""
    found: list[Tensor] = []
    for inputs in batches:
        if found and sum(kept.numel() for kept in found) + found[-1].numel() > LARGEST_OUTPUTS:
            break
        found.append(answers(inputs))
    return tuple(found)


@dataclass
class Watched:
    """Answers that are compared with the dense model's on the way: `dense` are its outputs on the first batches."""

    answers: Answers
    dense: Sequence[Tensor]
    batches: int = 0
    difference: float = 0.0
    power: float = 0.0

    def __call__(self, inputs: Tensor) -> Tensor:
        """The answers to the next batch, as they are."""
        outputs = self.answers(inputs)
        if self.batches < len(self.dense):
            expected = self.dense[self.batches].double()
            self.difference += float((outputs.double() - expected).square().sum())
            self.power += float(expected.square().sum())
        self.batches += 1
        return outputs

    @property
    def deviation(self) -> float:
        """The squared difference of the outputs / the squared dense outputs, both summed over what was asked so far.

        The difference alone where the dense outputs are all 0.
        """
        return self.difference / (self.power or 1.0)
