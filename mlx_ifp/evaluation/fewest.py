"""The fewest channels with which a task loses no more than it may."""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import IFPError
from ..llm.messages import Message
from ..model import IFPModel
from ..selection.keep import Keep, resolve_keep
from ..selection.selection import Selection
from .losses import Evaluation, Loss, Run
from .rows import Row
from .store import Store
from .ways import Way

# Shares of a layer's channels that are tried, the fewest first.
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class OneTask:
    """The selections of one task, for every prompt the same.

    Attributes:
        select: channels to keep -> the selection.
    """

    select: Callable[[Keep], Selection]

    def find(
        self, way: Way, keep: Keep | None, messages: list[Message], task: str
    ) -> Selection | None:
        """The selection that keeps so many channels, whatever the prompt."""
        assert keep is not None  # fewest_channels names a number
        return self.select(keep)


def fewest_channels(
    model: IFPModel,
    rows: list[Row],
    select: Callable[[Keep], Selection],
    most: float,
    store: Store,
    *,
    dense_prefill: bool,
) -> tuple[Selection, Loss]:
    """Try ever more channels until the loss is small enough.

    Args:
        model (IFPModel): what is measured.
        rows (list): prompts of the task, with answers.
        select (Callable): channels to keep -> the selection.
        most (float): the KL of a token that may be lost, in nats.
        store (Store): where scores are kept.
        dense_prefill (bool): whether the dense model reads the prompts.

    Returns:
        tuple: the selection, and what it loses.

    Raises:
        IFPError: if even the largest number loses more.
    """
    evaluation = Evaluation(
        model, rows, OneTask(select), store, dense_prefill=lambda _: dense_prefill
    )
    checkpoint, tried = model.checkpoint, set()
    for share in SHARES:
        keep = resolve_keep(share, checkpoint.d_ffn, len(checkpoint.ffns))[0]
        if keep in tried:
            continue
        tried.add(keep)
        (loss,) = evaluation.losses([Run(Way("named", name="this"), keep)])
        if loss.kl <= most:
            return select(keep), loss
    raise IFPError(
        f"With k = {keep:,} of {checkpoint.d_ffn:,} the KL is {loss.kl:.4f}, above {most:g}: give "
        "a larger --max-kl, or name k with --keep."
    )
