"""What each way to select loses on a user's prompts, at each k."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import IFPError
from ..generation.steps import token_steps
from ..llm.modules import PREFILL_STEP_SIZE
from ..memory.budget import Estimator
from ..model import IFPModel
from ..selection.keep import Keep
from ..selection.overlap import Overlap, overlap_summary
from ..selection.selection import Selection, digest_of
from ..selectors.selector import resolved_keep
from .rows import Row
from .scoring import ReadPrompt, Score, answer_logprobs, read_prompt, score
from .store import Store, key_of
from .ways import Selects, Way


@dataclass(frozen=True)
class Run:
    """A way to select, and how much of each layer it keeps.

    Attributes:
        way: what selects.
        keep: channels to keep; None for the checkpoint's k, or a saved task's own.
    """

    way: Way
    keep: Keep | None


@dataclass(frozen=True)
class TaskLoss:
    """The loss on the answers of one task.

    Attributes:
        kl: KL(dense || network) of a token, in nats: the mean over all tokens of the answers.
        agreement: the share of tokens for which both find the same one likeliest.
        ce: the network's cross-entropy of a token, in nats.
        exact: the share of answers that greedy decoding would give.
        answers: how many there are.
        tokens: of all answers.
    """

    kl: float
    agreement: float
    ce: float
    exact: float
    answers: int
    tokens: int

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "TaskLoss":
        """Gather the scores of answers."""
        tokens = sum(each.tokens for each in scores)
        return cls(
            kl=sum(each.kl for each in scores) / tokens,
            agreement=sum(each.agree for each in scores) / tokens,
            ce=sum(each.ce for each in scores) / tokens,
            exact=sum(all(each.right) for each in scores) / len(scores),
            answers=len(scores),
            tokens=tokens,
        )


@dataclass(frozen=True)
class Loss:
    """What a run loses, and what it costs.

    Attributes:
        way: the name of the way to select.
        ks: channels kept in each of L layers: the mean over prompts.
        share: the share of all channels that is kept.
        tasks: the loss by task.
        overlap: of the selections, within and between tasks; None for the dense model.
        ffn_bytes: bytes of the FFN channels that a token reads.
        memory_bytes: bytes of trunk and channels.
        tokens_per_second: of decoding; None if it was not measured.
    """

    way: str
    ks: list[int]
    share: float
    tasks: dict[str, TaskLoss]
    overlap: Overlap | None
    ffn_bytes: int
    memory_bytes: int
    tokens_per_second: float | None

    def _mean(self, name: str) -> float:
        return sum(getattr(task, name) for task in self.tasks.values()) / len(self.tasks)

    @property
    def kl(self) -> float:
        """The mean over tasks, which count alike."""
        return self._mean("kl")

    @property
    def agreement(self) -> float:
        """The mean over tasks, which count alike."""
        return self._mean("agreement")

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` writes it."""
        means = {name: self._mean(name) for name in ("kl", "agreement", "ce", "exact")}
        return {"way": self.way, **means} | {
            name: value for name, value in asdict(self).items() if name != "way"
        }


class Evaluation:
    """Measures runs on rows, and keeps each score as soon as it is there.

    The measure is how the model is used: the prompt is read by the dense model or by the
    sub-network, and the sub-network then reads the answer token by token.

    Args:
        model (IFPModel): what is measured.
        rows (list): prompts with answers.
        selections (Selects): what selects.
        store (Store): where scores are kept.
        dense_prefill (Callable): says whether the dense model reads the prompts of a way.
        reference (IFPModel): whose dense model is compared with; None for the model's own. After
            training, that is the model before it.
        prefill_step_size (int): tokens of a prompt that run at a time.
    """

    def __init__(
        self,
        model: IFPModel,
        rows: list[Row],
        selections: Selects,
        store: Store,
        *,
        dense_prefill: Callable[[Way], bool],
        reference: IFPModel | None = None,
        prefill_step_size: int = PREFILL_STEP_SIZE,
    ) -> None:
        self.model, self.rows, self.selections = model, rows, selections
        self.store, self.reference = store, reference or model
        self._dense_prefill, self._step = dense_prefill, prefill_step_size

    def scores(
        self, runs: Sequence[Run], progress: Callable[[], object] = lambda: None
    ) -> list[list[Score]]:
        """The scores of each run, one for each row.

        Args:
            runs: what is measured.
            progress (Callable): called after each row.

        Raises:
            IFPError: naming the line of the prompt that cannot be used.
        """
        found: list[list[Score]] = [[] for _ in runs]
        with ExitStack() as stack:
            # A dense model stays in memory from its first use on.
            load = cache(lambda of: stack.enter_context(of.using(of.prepare(dense=True))))
            for row in self.rows:
                try:
                    for scores, one in zip(found, self._row(row, runs, load), strict=True):
                        scores.append(one)
                except IFPError as error:
                    raise IFPError(f"line {row.line}: {error}") from error
                progress()
        return found

    def _select(self, run: Run, row: Row) -> Selection | None:
        return self.selections.find(run.way, run.keep, row.messages, row.task)

    def _row(
        self, row: Row, runs: Sequence[Run], load_dense: Callable[[IFPModel], nn.Module]
    ) -> list[Score]:
        """The scores of one row. Dense models are only loaded if one of them is missing."""
        selected = [self._select(run, row) for run in runs]
        dense_prefill = [self._dense_prefill(run.way) for run in runs]
        keys = [self._key(row, *each) for each in zip(selected, dense_prefill, strict=True)]
        if self.store.missing(keys):
            dense = load_dense(self.reference)
            read = read_prompt(dense, row.tokens, self._step)
            reference = answer_logprobs(dense, read, row.answer)
            mx.eval(reference)
            if self.reference is not self.model and any(dense_prefill):
                read = read_prompt(load_dense(self.model), row.tokens, self._step)
            for run, selection, densely, key in zip(
                runs, selected, dense_prefill, keys, strict=True
            ):
                if key not in self.store:
                    logprobs = self._answer(row, selection, read if densely else None)
                    self.store.add(key, score(reference, logprobs, row.answer).to_json())
                    if run.way.by == "prompt" and selection is not None:
                        # No other prompt has this sub-network, so memory is not filled with it.
                        self.model.networks.drop(selection.digest)
                    mx.clear_cache()
        return [Score(**self.store.get(key)) for key in keys]

    def _answer(self, row: Row, selection: Selection | None, read: ReadPrompt | None) -> mx.array:
        """Log-probabilities of a row's answer; the network reads the prompt if nobody has."""
        prepared = self.model.prepare(selection=selection, dense=selection is None)
        with self.model.using(prepared) as network:
            if read is None or selection is None:
                read = read_prompt(network, row.tokens, self._step)
            logprobs = answer_logprobs(network, read, row.answer)
            mx.eval(logprobs)
            return logprobs

    def _key(self, row: Row, selection: Selection | None, dense_prefill: bool) -> str:
        digest = digest_of(selection)
        return key_of(
            "score",
            self.model.checkpoint.digest,
            self.reference.checkpoint.digest,
            str(self.model.dtype),
            row.tokens,
            row.answer,
            digest,
            # The dense model reads its own prompts anyway.
            dense_prefill and selection is not None,
        )

    def losses(
        self,
        runs: Sequence[Run],
        *,
        speed_tokens: int = 0,
        progress: Callable[[], object] = lambda: None,
    ) -> list[Loss]:
        """What each run loses, and what it costs.

        Args:
            runs: what is measured.
            speed_tokens (int): tokens to decode for the speed; 0 does not measure it.
            progress (Callable): called after each row.
        """
        scores = self.scores(runs, progress)
        return [self._loss(run, own, speed_tokens) for run, own in zip(runs, scores, strict=True)]

    def _loss(self, run: Run, scores: list[Score], speed_tokens: int) -> Loss:
        model, checkpoint = self.model, self.model.checkpoint
        tasks: dict[str, list[Score]] = defaultdict(list)
        for row, one in zip(self.rows, scores, strict=True):
            tasks[row.task].append(one)
        selected = [self._select(run, row) for row in self.rows]
        kept = [each for each in selected if each is not None]
        ks = resolved_keep(checkpoint, 1.0)
        if kept:
            by_layer = zip(*(each.ks for each in kept), strict=True)
            ks = [round(sum(layer) / len(kept)) for layer in by_layer]
        estimator = Estimator(checkpoint, model.dtype)
        ffn_bytes = estimator.network(ks, dense=not kept)
        return Loss(
            way=run.way.label,
            ks=ks,
            share=sum(ks) / (len(ks) * checkpoint.d_ffn),
            tasks={task: TaskLoss.of(each) for task, each in tasks.items()},
            overlap=overlap_summary(kept, [row.task for row in self.rows]) if kept else None,
            ffn_bytes=ffn_bytes,
            memory_bytes=estimator.trunk + ffn_bytes,
            tokens_per_second=self._speed(selected[0], speed_tokens) if speed_tokens else None,
        )

    def _speed(self, selection: Selection | None, count: int) -> float:
        model = self.model
        prepared = model.prepare(selection=selection, dense=selection is None)
        with model.using(prepared) as network:
            return decode_speed(network, self.rows[0].tokens, count)


def decode_speed(network: nn.Module, prompt: list[int], count: int) -> float:
    """Tokens a second of a network that answers a prompt, without the first token.

    Args:
        network (nn.Module): an mlx-lm model, which its caller keeps in memory.
        prompt (list): [n] ids, n >= 1.
        count (int): tokens to decode.
    """
    with closing(token_steps(mx.array(prompt), network)) as steps:
        next(steps)
        start = time.perf_counter()
        for _ in range(count):
            next(steps)
        return count / (time.perf_counter() - start)


def smallest(losses: Sequence[Loss], most: float) -> dict[str, dict[str, Loss | None]]:
    """For each way and task the run with the fewest channels that loses no more than ``most``.

    Args:
        losses: of several k for each way.
        most (float): KL, in nats.

    Returns:
        dict: way -> task -> its loss, or None if no run keeps that.
    """
    found: dict[str, dict[str, Loss | None]] = {}
    for loss in sorted(losses, key=lambda loss: loss.share):
        tasks = found.setdefault(loss.way, dict.fromkeys(loss.tasks))
        for task, its in loss.tasks.items():
            if tasks[task] is None and its.kl <= most:
                tasks[task] = loss
    return found
