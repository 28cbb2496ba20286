"""What may be cut: one file is one pattern family."""

from graphprune.pattern import Pattern
from graphprune.patterns.block import Block
from graphprune.patterns.filter import Filter
from graphprune.patterns.groups import Groups
from graphprune.patterns.heads import Heads
from graphprune.patterns.hidden import Hidden
from graphprune.patterns.kernel import Kernel
from graphprune.patterns.kernel_mix import KernelMix
from graphprune.patterns.n_of_m import NOfM
from graphprune.patterns.width import Width

PATTERNS: dict[str, type[Pattern]] = {
    pattern.name: pattern for pattern in (Filter, Kernel, KernelMix, Groups, Heads, Hidden, Width, Block, NOfM)
}

__all__ = ["PATTERNS"]
