"""A request on its way through the scheduler: a ticket, and what its work needs."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError
from ..llm.kv_cache import Generation
from ..llm.messages import Message
from ..llm.overflow import not_finite
from ..llm.prompt import shared_prefix
from ..prompt_cache.files import PromptCache
from .sampling import Chooser
from .stream import Answer
from .ticket import FailedError, Ticket, Token

# A part of a prompt, and the kind under which it is kept when it has been processed.
Segment = tuple[list[int], str | None]


@dataclass(eq=False)
class Job:
    """One request's work.

    Attributes:
        ticket: what its owner holds.
        chooser: how its tokens are chosen.
        segments: the parts of the prompt that are left to process. Between two of them mlx-lm
            stops, so that keys and values can be kept.
        group: the digest of its selection, once that is known.
        prompt_key: what those of its prompt are right for, if the whole model has read it.
        key: what they are right for when it ends.
        cache: those that are there already.
        logits: [1, V] after the prompt's last token, if the whole prompt was processed already.
        tokenizer: the LLM's.
        generation: its lengths.
        computing_type: what the LLM computes in.
        answer: its answer as a request alone gets it, once it was begun.
        hold: what keeps the sub-network in memory; closing it lets go.
    """

    ticket: Ticket
    chooser: Chooser
    segments: list[Segment]
    tokenizer: TokenizerWrapper
    generation: Generation
    computing_type: mx.Dtype | None
    group: str = ""
    prompt_key: Any = None
    key: Any = None
    cache: PromptCache | None = None
    logits: mx.array | None = None
    answer: Answer | None = None
    hold: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self._detokenizer = self.tokenizer.detokenizer
        self._kinds: list[str | None] = []

    def begin_after(self, count: int) -> None:
        """Leave out the prompt's first tokens, whose keys and values are there already."""
        segments = list(self.segments)
        while count and segments:
            tokens, kind = segments[0]
            if count < len(tokens):
                segments[0] = tokens[count:], kind
                break
            count -= len(tokens)
            segments.pop(0)
        self.segments = segments
        self._kinds = [kind for _, kind in segments]

    @property
    def processed(self) -> list[int]:
        """The tokens whose keys and values are there already: all, if the answer has begun."""
        tokens = self.ticket.tokens
        return list(tokens) if self.ticket.generated else tokens[: self.ticket.cached_tokens]

    def take_cache(self) -> PromptCache | None:
        """The prompt cache, which is the batch's from now on."""
        cache, self.cache = self.cache, None
        return cache

    def warm_tokens(self) -> int:
        """How many first tokens of the prompt are the same whatever the user says."""
        messages = cast(list[Message], self.ticket.request.prompt)
        kwargs = self.ticket.request.chat_template_kwargs
        return shared_prefix(self.tokenizer, messages, self.ticket.tokens, **kwargs)

    def begin(self) -> bool:
        """Choose the answer's first token from the logits after the prompt.

        The token is then all that is left to process.

        Returns:
            bool: whether the answer ends with it.
        """
        logits, self.logits = cast(mx.array, self.logits), None
        chooser, tokens = self.chooser, self.ticket.tokens
        token, logprobs = chooser.first(tokens, logits)
        reason = "length" if chooser.sampling.max_tokens == 1 else None
        reason = "stop" if chooser.passed(token) else reason
        self.put(token, logprobs, reason)
        self.segments = [([token], None)]
        self._kinds = [None]
        if reason is not None:
            self.ticket.end()
        return reason is not None

    def next_kind(self) -> str | None:
        """The kind of the segment that was just processed; None if it is not kept."""
        return self._kinds.pop(0) if len(self._kinds) > 1 else None

    def read(self, done: int) -> None:
        """Tell how many tokens of the prompt's rest are processed."""
        if self.ticket.generated:
            # The rest is the first token, which was chosen already.
            return
        self.ticket.progress(min(self.ticket.cached_tokens + done, len(self.ticket.tokens)))

    def put(self, token: int, logprobs: mx.array, finish_reason: str | None) -> None:
        """Hand a token out.

        Args:
            token (int): its id.
            logprobs (mx.array): [V].
            finish_reason (str): ``stop``, ``length`` or None.

        Raises:
            Exception: if it was not chosen as the request says, whatever was in the way.
        """
        if self.chooser.error is not None:
            raise self.chooser.error
        # mlx-lm chooses a token even where there is no number.
        if not self.ticket.generated and mx.isnan(logprobs).any():
            raise not_finite("The logits are no numbers", self.computing_type)
        text, sampling = self._detokenizer, self.chooser.sampling
        if finish_reason != "stop":
            text.add_token(token)
        if finish_reason is not None:
            text.finalize()
        logprob = cast(float, logprobs[token].item()) if sampling.logprobs else None
        top = self._top(logprobs, sampling.top_logprobs)
        self.ticket.put(Token(token, text.last_segment, logprob, top, finish_reason))

    def _top(self, logprobs: mx.array, count: int) -> tuple[dict[str, Any], ...]:
        if count <= 0:
            return ()
        ids = mx.argsort(-logprobs)[:count]
        found: list[int] = ids.tolist()  # type: ignore[assignment]
        values: list[float] = logprobs[ids].tolist()  # type: ignore[assignment]
        names = self.tokenizer.convert_ids_to_tokens(found)
        rows = zip(found, names, values, strict=True)
        return tuple({"id": id, "token": name, "logprob": value} for id, name, value in rows)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self.ticket.end(failure(error))


def failure(error: BaseException) -> IFPError:
    """An error as the request's owner is told it."""
    if isinstance(error, IFPError):
        return error
    failed = FailedError(f"Generation stopped: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed
