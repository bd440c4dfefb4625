"""A conversation: each turn processes only the tokens that its sub-network has not read yet."""

import contextlib
from collections.abc import Generator
from dataclasses import replace
from typing import Any, cast

from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..llm.messages import Message
from ..llm.prompt import Text, common_prefix, token_ids
from ..model import IFPModel
from ..prompt_cache.files import PromptCache
from ..selection.selection import digest_of
from .request import Request
from .stream import Answer

Responses = Generator[GenerationResponse, None, None]


class Conversation:
    """The messages of a chat, with the keys and values of what was processed of them.

    They are kept while the same text or selection selects, so that a turn processes only what is
    new. Where the chat template changes earlier tokens, for example because it leaves out old
    reasoning, those from the first change on are processed again.

    Each answer is that of :func:`mlx_ifp.generate` to the whole conversation. If the whole model
    reads prompts, there is one difference: keys and values of earlier answers are those of the
    sub-network that gave them.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`.
        tokenizer: from the same call.
        request (Request): how to answer; its prompt is not used.
        system (str): the system prompt.

    Attributes:
        request: as given. Another one may be set between two turns.
        system: the system prompt, or None. It may be changed too.
        turns: the messages of the user and of the assistant, in turns.
        answer: the last answer, or None.
        reused: tokens of its prompt that were not processed again.
    """

    def __init__(
        self,
        model: IFPModel,
        tokenizer: TokenizerWrapper,
        request: Request,
        system: str | None = None,
    ) -> None:
        self.request, self.system = request, system
        self.turns: list[Message] = []
        self.answer: Answer | None = None
        self.reused = 0
        self._model, self._tokenizer = model, tokenizer
        self._forget()

    def reset(self) -> None:
        """Begin anew: forget all turns, but not the system prompt."""
        self.turns = []
        self._forget()

    def _forget(self) -> None:
        self._prompt_cache: PromptCache | None = None
        self._tokens: list[int] = []
        self._chosen_by: tuple[Any, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """All messages, the system prompt first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def reply(self, content: str) -> Responses:
        """What the assistant says to a message of the user.

        The sub-network is ready when this returns; the tokens come with the iteration. Both
        messages become part of the conversation when the answer ends or is closed. If nothing was
        said until then, neither does.

        Raises:
            IFPError: if the request cannot be served; the conversation is as it was.
        """
        asked = {"role": "user", "content": content}
        request = replace(self.request, prompt=[*self.messages, asked])
        text = request.selecting_text(self._model, self._tokenizer)
        # The chat template gives token ids, no text.
        tokens = token_ids(cast(list[int], request.encode(self._tokenizer)))
        self.reused = self._rewind(request, text, tokens)
        rest = replace(
            request,
            prompt=tokens[self.reused :],
            task=text if isinstance(text, str) else None,
            task_from=None,
            options={**request.options, "prompt_cache": self._prompt_cache},
        )
        self.answer = Answer(self._model, self._tokenizer, rest)
        try:
            # The whole model may read the prompt now.
            _ = self.answer.ready
        except BaseException:
            self._forget()
            raise
        return self._stream(self.answer, asked, tokens)

    def _rewind(self, request: Request, text: Text | None, tokens: list[int]) -> int:
        """Cut the prompt cache to what it shares with the tokens; returns how many these are."""
        given = None if request.selection is None else digest_of(request.selection)
        chosen_by = (
            text,
            given,
            None if request.prior is None else request.prior.tobytes(),
            request.dense,
            request.selector,
            request.keep,
            request.prefill,
            request.kv,
        )
        # At least one token must be left to process.
        common = min(common_prefix(self._tokens, tokens), len(tokens) - 1)
        surplus = len(self._tokens) - common
        cache = self._prompt_cache
        if cache is None or chosen_by != self._chosen_by or not _trimmed(cache, surplus):
            # The trunk has the layers, and so the caches, of each of its sub-networks.
            self._prompt_cache = make_prompt_cache(self._model.trunk, request.kv.max_kv_size)
            common = 0
        self._tokens, self._chosen_by = tokens[:common], chosen_by
        return common

    def _stream(self, answer: Answer, asked: Message, tokens: list[int]) -> Responses:
        said, processed, ended = "", [*tokens], False
        try:
            # mlx-lm has processed each token that it hands out, the last one included.
            with contextlib.closing(cast(Responses, iter(answer))) as responses:
                for response in responses:
                    said += response.text
                    processed.append(response.token)
                    yield response
            ended = True
            self._tokens = processed
        except GeneratorExit:
            self._tokens = processed
            raise
        except BaseException:
            # It may have come between two layers, of which only the first has the token then.
            self._forget()
            raise
        finally:
            if said or ended:
                self.turns += [asked, {"role": "assistant", "content": said}]


def _trimmed(prompt_cache: PromptCache, count: int) -> bool:
    """Take the last ``count`` tokens away; False if these caches do not allow it."""
    if count == 0:
        return True
    if not can_trim_prompt_cache(prompt_cache):
        return False
    return trim_prompt_cache(prompt_cache, count) == count
