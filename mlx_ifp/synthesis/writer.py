"""A chat model writes its own training data (Xu et al. 2024, "Magpie", arXiv 2406.08464).

After the beginning of a user's turn a chat model goes on with what users ask. What it writes until
the turn ends is a prompt, and what it answers to that prompt alone is the answer.
"""

import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError
from .filters import Duplicates, find_loop, why_useless
from .sampling import Request, Written, check_batchable, sample_texts
from .user_turn import UserTurn

# Prompts are written in rounds of so many batches, each followed by their answers. All texts of a
# batch are then sampled alike, and a run that is stopped loses the prompts of one round.
_BATCHES_OF_A_ROUND = 4
# So many sentences of a task stand before a new one, as if users had said them earlier.
_SENTENCES = 3
# A model that makes fewer rows than this share of the last prompts would never come to an end.
_HOPE, _LAST_PROMPTS = 0.02, 400

Messages = list[dict[str, Any]]
# Names of tasks, each with a description or with sentences that users say.
Tasks = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class SynthesisArgs:
    """How texts are sampled, and how many.

    Attributes:
        count: rows whose prompts the model writes; such rows in the file count, too.
        batch_size: texts at once.
        max_prompt_tokens: the most tokens of a prompt that is written.
        max_answer_tokens: the most tokens of an answer; a longer one is cut.
        max_seq_length: the most tokens of a given prompt and its answer; a prompt that is too
            long for that is left out.
        temp: temperature of prompts.
        answer_temps: temperatures of answers; one of them is drawn for each answer.
        top_p: nucleus sampling for all texts.
        seed: seed of everything that is drawn.
    """

    count: int
    batch_size: int = 32
    max_prompt_tokens: int = 128
    max_answer_tokens: int = 256
    max_seq_length: int = 2048
    temp: float = 1.0
    answer_temps: Sequence[float] = (0.7, 0.0, 1.0)
    top_p: float = 0.95
    seed: int = 0

    def check(self) -> None:
        """Raises IFPError if a number is out of range."""
        if min(self.temp, *self.answer_temps) < 0:
            raise IFPError("--temp and --answer-temp must be 0 or more.")
        if not 0 < self.top_p <= 1:
            raise IFPError(f"--top-p must be above 0 and at most 1, not {self.top_p}.")


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: messages, of which the last is the user's, and the row's task."""

    messages: Messages
    task: str
    own: bool = False


class Synthesis:
    """Writes prompts and answers, and keeps the rows that are of use.

    Each row is in the file as soon as its answer is finished. With the same seed and the same
    earlier rows, the rows are the same; with other earlier rows, other prompts are written.

    Args:
        model (nn.Module): a chat model of mlx-lm.
        tokenizer: the model's tokenizer.
        args (SynthesisArgs): how texts are sampled, and how many.
        file: where rows go; earlier rows stay before them.
        tasks: the tasks to write prompts for; without any, a prompt may be about anything.
        earlier (list): the rows that the file has already.
        on_row (Callable): called after each new row.

    Raises:
        IFPError: if a number is out of range, or the model cannot write prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        args: SynthesisArgs,
        file: TextIO,
        *,
        tasks: Tasks | None = None,
        earlier: Sequence[dict[str, Any]] = (),
        on_row: Callable[[], Any] = lambda: None,
    ) -> None:
        args.check()
        check_batchable(model)
        self.args, self.tasks = args, dict(tasks or {})
        self.rows: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.truncated = self.sampled_tokens = 0
        self._model, self._file, self._on_row = model, file, on_row
        self._turn = UserTurn(tokenizer)
        self._stops = {self._turn.end, *tokenizer.eos_token_ids}
        # A continued file gets another seed, so that it does not repeat its first rows.
        self._chance = random.Random(f"{args.seed} {len(earlier)}")
        mx.random.seed(self._chance.getrandbits(63))
        self._duplicates = Duplicates()
        self._answered = {_key(row["messages"][:-1]) for row in earlier}
        self.own = 0
        for row in earlier:
            if row.get("source") == "own":
                self.own += 1
                self._duplicates.add(str(row["messages"][0].get("content")))
        # For each of the last prompts that the model wrote, this says whether it became a row.
        self._last: deque[bool] = deque(maxlen=_LAST_PROMPTS)

    def answer(self, prompts: Sequence[Prompt]) -> None:
        """Answer given prompts, except those whose answers the file already has."""
        new = [each for each in prompts if _key(each.messages) not in self._answered]
        for start in range(0, len(new), self._round):
            for _ in self._answers(new[start : start + self._round]):
                pass

    def write(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Write prompts and answer them until the file has ``count`` rows of this kind.

        Args:
            enough (Callable): says before each round whether it shall be the last one's end.

        Raises:
            IFPError: if hardly any prompt is of use.
        """
        while self.own < self.args.count and not enough():
            self._check_hope()
            size = min(self.args.count - self.own, self._round)
            prompts = self._prompts(size)
            rows = sum(1 for _ in self._answers(prompts))
            self.own += rows
            self._last.extend([True] * rows + [False] * (size - rows))

    @property
    def _round(self) -> int:
        return _BATCHES_OF_A_ROUND * self.args.batch_size

    def _check_hope(self) -> None:
        if len(self._last) == _LAST_PROMPTS and sum(self._last) < _HOPE * _LAST_PROMPTS:
            reasons = ", ".join(f"{n:,} {why}" for why, n in self.refused.most_common())
            raise IFPError(
                f"Of the last {_LAST_PROMPTS} prompts that the model wrote, {sum(self._last)} were "
                f"of use (refused: {reasons}). Written rows are kept; use a chat model that knows "
                "what users say."
            )

    def _sample(self, requests: list[Request]) -> Iterator[Written]:
        args = self.args
        texts = sample_texts(self._model, requests, self._stops, top_p=args.top_p,
                             batch_size=args.batch_size)  # fmt: skip
        for written in texts:
            self.sampled_tokens += len(written.tokens) + written.ended
            yield written

    def _prompts(self, n: int) -> list[Prompt]:
        """Let the model write n prompts, and give those that are of use."""
        begun = [self._begin() for _ in range(n)]
        requests = [
            Request(tokens, self.args.max_prompt_tokens, self.args.temp) for _, tokens in begun
        ]
        prompts = []
        for written in self._sample(requests):
            text = self._turn.decode(written.tokens).strip()
            why = why_useless(text, written.tokens, self._turn.special)
            if not written.ended:
                why = "long"
            elif why is None and self._duplicates.add(text):
                why = "duplicate"
            if why:
                self.refused[why] += 1
                continue
            task, _ = begun[written.place]
            prompts.append(Prompt([{"role": "user", "content": text}], task, own=True))
        return prompts

    def _begin(self) -> tuple[str, list[int]]:
        """Choose the task of a new prompt, and give the tokens after which it is written."""
        if not self.tasks:
            return "own", self._turn.beginning([])
        name, about = self._chance.choice(list(self.tasks.items()))
        if isinstance(about, str):
            return name, self._turn.beginning([{"role": "system", "content": about}])
        # Sentences that users said earlier show the model what they may say next.
        said = self._chance.sample(about, min(_SENTENCES, len(about)))
        return name, self._turn.beginning([{"role": "user", "content": each} for each in said])

    def _answers(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """Answer prompts; each row is in the file before it is yielded."""
        args, asked = self.args, []
        for prompt in prompts:
            request = Request(
                self._turn.question(prompt.messages),
                args.max_answer_tokens,
                self._chance.choice(args.answer_temps),
            )
            if len(request.prompt) + args.max_answer_tokens > args.max_seq_length:
                self.refused["long"] += 1
            else:
                asked.append((prompt, request))
        asked.sort(key=lambda each: each[1].temperature)
        for written in self._sample([request for _, request in asked]):
            prompt, request = asked[written.place]
            row = self._row(prompt, written, request.temperature)
            if row is None:
                self.refused["no answer"] += 1
                continue
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
            self.rows[prompt.task] += 1
            self.truncated += row.get("truncated", False)
            self._on_row()
            yield row

    def _row(self, prompt: Prompt, written: Written, temperature: float) -> dict[str, Any] | None:
        """Make the row of an answer; None if the answer is empty."""
        tokens, whole = written.tokens, written.ended
        special = next((i for i, t in enumerate(tokens) if t in self._turn.special), None)
        cuts = [cut for cut in (find_loop(tokens), special) if cut is not None]
        if cuts:
            tokens, whole = tokens[: min(cuts)], False
        text = self._turn.decode(tokens)
        # The answer may have been cut inside a character.
        text = (text if whole else text.rstrip("\ufffd")).strip()
        if not text:
            return None
        row = {
            "messages": [*prompt.messages, {"role": "assistant", "content": text}],
            "task": prompt.task,
            "source": "own" if prompt.own else "given",
            "temperature": temperature,
        }
        return row if whole else row | {"truncated": True}


def _key(messages: Messages) -> str:
    return json.dumps(messages, sort_keys=True)
