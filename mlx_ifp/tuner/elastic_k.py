"""Train each batch with another number of channels out of a range, which is called elastic k."""

import math
from dataclasses import dataclass

import numpy as np

from ..selection.keep import WIDTH_MULTIPLE, Keep, resolve_one_keep


@dataclass(frozen=True)
class KeepRange:
    """The counts of channels to keep in each layer that a checkpoint is trained for.

    Attributes:
        low, high: its ends.
    """

    low: int
    high: int

    @classmethod
    def of(cls, ends: list[Keep], d_ffn: int, layers: int) -> "KeepRange":
        """Make a range of two ends as users give them, in any order.

        Raises:
            IFPError: if an end is out of range, or is not one number for all layers.
        """
        low, high = sorted(resolve_one_keep(end, d_ffn, layers) for end in ends)
        return cls(low, high)

    def __contains__(self, k: int) -> bool:
        return self.low <= k <= self.high

    @property
    def middle(self) -> int:
        """A count in the middle, a multiple of 64 if the range has one there."""
        middle = (self.low + self.high) // 2
        rounded = round(middle / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        return rounded if rounded in self else middle

    def draw(self, seed: int, number: int) -> int:
        """The count that batch ``number`` is trained with, the same on all processes.

        It is a multiple of 64 or an end of the range, if there are multiples between the ends.
        """
        first = math.ceil(self.low / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        counts = sorted({self.low, self.high, *range(first, self.high + 1, WIDTH_MULTIPLE)})
        if len(counts) <= 2:
            counts = list(range(self.low, self.high + 1))
        return int(np.random.default_rng([seed, 4, number]).choice(counts))
