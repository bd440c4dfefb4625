"""Counts of a scheduler."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerInfo:
    """What a :class:`Scheduler` holds now, and how often it did what.

    Attributes:
        waiting: requests without a place.
        running: requests with one.
        steps: for each selection that runs now, by its digest, the steps of its batch so far.
        kept_prompts: prompts whose keys and values are kept.
        kept_bytes: bytes of these.
        released: how often memory was freed because nothing was asked for.
    """

    waiting: int
    running: int
    steps: dict[str, int]
    kept_prompts: int
    kept_bytes: int
    released: int
