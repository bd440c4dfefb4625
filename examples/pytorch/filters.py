"""Recognize texts of a model that are of no use for training."""

import re
from collections import Counter

import numpy as np


def find_loop(tokens: list[int], longest: int = 64, least: int = 24) -> int | None:
    """Where a text that goes round in circles should end, or None if it does not.

    A loop is a piece that stands there three times in a row. The first two copies stay.

    Args:
        tokens: the tokens of the text.
        longest (int): the most tokens that a piece has.
        least (int): the fewest tokens that a loop has beyond its first piece.

    Returns:
        int: how many tokens to keep.
    """
    pieces = len(tokens) - 7
    # In a loop some pieces of eight tokens repeat, which is quick to check.
    if pieces < 2 or len({tuple(tokens[i : i + 8]) for i in range(pieces)}) == pieces:
        return None
    ids = np.array(tokens)
    ends = []
    for period in range(1, min(longest, len(ids) // 3) + 1):
        differ = np.flatnonzero(ids[period:] != ids[:-period])
        edges = np.concatenate([[-1], differ, [len(ids) - period]])
        runs = np.diff(edges) - 1
        long = np.flatnonzero(runs >= max(2 * period, least))
        if len(long):
            ends.append(int(edges[long[0]]) + 1 + 2 * period)
    return min(ends, default=None)


class Duplicates:
    """Knows texts by their word trigrams.

    Args:
        share (float): a text is a duplicate if one earlier text has this share of its trigrams.
    """

    def __init__(self, share: float = 0.8) -> None:
        self.share = share
        self._whole: set[tuple[str, ...]] = set()
        # It maps a trigram to the last text that has it.
        self._last: dict[tuple[str, ...], int] = {}
        self._count = 0

    def add(self, text: str) -> bool:
        """Whether a text is a duplicate. If it is not, it becomes one of the known texts."""
        words = tuple(re.findall(r"\w+", text.lower())[:100])
        trigrams = {words[i : i + 3] for i in range(max(1, len(words) - 2))}
        seen = Counter(self._last[trigram] for trigram in trigrams if trigram in self._last)
        most = seen.most_common(1)[0][1] if seen else 0
        if words in self._whole or most >= self.share * len(trigrams):
            return True
        self._whole.add(words)
        self._last.update(dict.fromkeys(trigrams, self._count))
        self._count += 1
        return False


def why_useless(text: str, tokens: list[int], special: set[int]) -> str | None:
    """Why a prompt is of no use, in a word or two; None if it is fine.

    Odd prompts are fine: a pruned model must behave as the dense model does on those, too.

    Args:
        text: the prompt.
        tokens: the tokens that were sampled for it.
        special: ids of tokens that no user writes.
    """
    if not special.isdisjoint(tokens) or "\ufffd" in text:
        return "special tokens"
    words = re.findall(r"\w+", text.lower())
    if len(text) < 3 or not words:
        return "empty"
    most = Counter(words).most_common(1)[0][1]
    if find_loop(tokens) is not None or (len(words) > 20 and most > 0.3 * len(words)):
        return "repetition"
    return None
