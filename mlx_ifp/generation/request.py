"""What is asked for: a prompt, what selects, and how to generate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.directory import Checkpoint
from ..choices import PREFILLS
from ..errors import IFPError
from ..llm.kv_cache import Generation, KVSettings
from ..llm.messages import Message
from ..llm.prompt import (
    Encoded,
    Prompt,
    Text,
    encode_continuation,
    encode_prompt,
    is_messages,
    read_prompt,
)
from ..model import IFPModel
from ..prompt_cache.files import stored_positions
from ..selection.keep import Keep
from ..selection.selection import Selection
from ..selectors.selector import resolved_keep
from ..selectors.text import selecting_text


@dataclass(frozen=True)
class Request:
    """One generation as it is asked for, from Python or from a command line.

    Attributes:
        prompt: a string, token ids, or a list of messages, which the chat template formats. A last
            message of the assistant is continued, not answered.
        task: a description that selects; without it the prompt does.
        task_from: which message selects then: ``user`` or ``system``; None for what the checkpoint
            says.
        selection: use this one.
        dense: use the whole model.
        selector: ``predictor``, ``activations``, ``static`` or ``glass``; None for the default.
        keep: channels to keep in each layer, instead of the checkpoint's k.
        prior: float32 [L, d_ffn], what ``glass`` blends with the text that selects instead of the
            checkpoint's prior, such as the ``scores`` of a named task.
        chat_template_kwargs: arguments for the chat template.
        ignore_chat_template: of messages only what the user says first is the prompt, as it is.
        to_be_continued: the last message has no end: a later prompt goes on in it.
        warm: keep the keys and values of what stands before the first user message, so that the
            next prompt of the same selection begins after it.
        warm_on_disk: keep them on disk too, for the next process.
        prompt_cache_file: a file of ``mlx_ifp.cache_prompt`` that the prompt continues.
        prefill: who reads the prompt: ``dense``, the whole model, or ``pruned``, the sub-network
            that answers; None for what suits the selector.
        options: the arguments of ``mlx_lm.stream_generate``. A ``draft_model`` may be a name.
    """

    prompt: Prompt
    task: str | None = None
    task_from: str | None = None
    selection: Selection | None = None
    dense: bool = False
    selector: str | None = None
    keep: Keep | None = None
    prior: np.ndarray | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    ignore_chat_template: bool = False
    to_be_continued: bool = False
    warm: bool = False
    warm_on_disk: bool = False
    prompt_cache_file: str | Path | None = None
    prefill: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Give messages the one form that selection and chat template read.

        Raises:
            IFPError: naming a message that cannot be read.
        """
        object.__setattr__(self, "prompt", read_prompt(self.prompt))

    def check(self) -> None:
        """Raises IFPError if parts of it exclude each other."""
        others = ("prompt_cache", "draft_model")
        given = [name for name in others if self.options.get(name) is not None]
        if self.prompt_cache_file is not None and given:
            raise IFPError(f"prompt_cache_file and {given[0]} exclude each other.")
        self._check_prefill()
        if not self.warm:
            return
        if not is_messages(self.prompt) or self.ignore_chat_template:
            raise IFPError(
                "A warm prompt is found by the chat template; give the prompt as messages."
            )
        if self.prompt_cache_file is not None:
            given.append("prompt_cache_file")
        if given:
            raise IFPError(f"A warm prompt and {given[0]} exclude each other.")

    def _check_prefill(self) -> None:
        if self.prefill is None:
            return
        if self.prefill not in PREFILLS:
            raise IFPError(f"prefill must be 'dense' or 'pruned', not {self.prefill!r}.")
        if self.dense:
            raise IFPError("--dense and --prefill (dense=, prefill=) exclude each other.")
        if self.prefill == "dense" and (name := self._pruned_only) is not None:
            raise IFPError(
                f"{name} does not go with a prompt that the whole model reads; "
                "give --prefill pruned (prefill='pruned'), or leave it out."
            )

    @property
    def _pruned_only(self) -> str | None:
        """The option that a dense prefill does not serve, if one is given."""
        if self.options.get("draft_model") is not None:
            # It would have to read the prompt, too.
            return "A draft model"
        return "input_embeddings" if self.options.get("input_embeddings") is not None else None

    def prefill_by(self, checkpoint: Checkpoint, default: str) -> str:
        """Who reads the prompt: ``dense`` or ``pruned``.

        Args:
            checkpoint (Checkpoint): the one that answers.
            default (str): the selector that is used if the request names none.
        """
        if self.prefill is not None:
            return self.prefill
        # The network of a dense request is the whole model already.
        if self.dense or self._pruned_only is not None:
            return "pruned"
        return checkpoint.ifp.prefill_with(self.selector or default)

    @property
    def kv(self) -> KVSettings:
        """How the request's keys and values are kept."""
        return KVSettings.of(self.options)

    def encode(self, tokenizer: TokenizerWrapper) -> Encoded:
        """The prompt as mlx-lm is given it: text or token ids.

        Where the prompt continues a stored one, only what follows that one is given.

        Raises:
            IFPError: if it is empty, or the chat template does not take it.
        """
        begins = self.prompt_cache_file is None
        prompt = self.prompt
        if is_messages(prompt) and self.ignore_chat_template:
            return tokenizer.encode(_first_of_user(prompt), add_special_tokens=begins)
        if is_messages(prompt) and not begins:
            return encode_continuation(tokenizer, prompt, **self.chat_template_kwargs)
        tokens = encode_prompt(
            tokenizer,
            prompt,
            to_be_continued=self.to_be_continued,
            **self.chat_template_kwargs,
        )
        if isinstance(tokens, str) and not begins:
            return tokenizer.encode(tokens, add_special_tokens=False)
        return tokens

    def check_in_company(self) -> None:
        """Raises IFPError for what cannot be served together with other requests."""
        self.check()
        for name in ("draft_model", "prompt_cache"):
            if self.options.get(name) is not None:
                raise IFPError(f"A request that is served with others takes no {name}.")
        if self.prompt_cache_file is not None:
            raise IFPError("A request that is served with others takes no prompt_cache_file.")

    def generation(self, tokenizer: TokenizerWrapper, tokens: Encoded | None = None) -> Generation:
        """What determines the size of the request's keys and values.

        Args:
            tokenizer, tokens: as for :meth:`positions`.

        Raises:
            IFPError: if there is no limit of tokens, or a draft model: see :meth:`Generation.of`.
        """
        return Generation.of(self.positions(tokenizer, tokens), **self.options)

    def positions(self, tokenizer: TokenizerWrapper, tokens: Encoded | None = None) -> int:
        """Tokens of the prompt, with those before it in a stored prompt or a prompt cache.

        Args:
            tokenizer: the LLM's.
            tokens: what :meth:`encode` gives; None encodes the prompt.
        """
        tokens = self.encode(tokenizer) if tokens is None else tokens
        count = len(tokenizer.encode(tokens) if isinstance(tokens, str) else tokens)
        if self.prompt_cache_file is not None:
            count += stored_positions(self.prompt_cache_file)
        prompt_cache = self.options.get("prompt_cache") or []
        return count + max((getattr(layer, "offset", 0) for layer in prompt_cache), default=0)

    def ks(self, model: IFPModel) -> list[int]:
        """How many channels its network has in each of L layers."""
        if self.dense:
            return resolved_keep(model.checkpoint, 1.0)
        if self.selection is not None:
            return self.selection.ks
        if self.keep is not None:
            return resolved_keep(model.checkpoint, self.keep)
        return model.text_selector.ks

    def selecting_text(self, model: IFPModel, tokenizer: TokenizerWrapper) -> Text | None:
        """The task if there is one, else what the prompt says; None if no text selects."""
        if self.dense or self.selection is not None:
            return None
        if self.task is not None:
            return self.task
        decode = None
        if model.selector_tokenizer(self.selector) is not tokenizer:
            decode = partial(tokenizer.decode, skip_special_tokens=True)
        role = self.task_from or model.checkpoint.ifp.text.source
        return selecting_text(self.prompt, role, decode)


def _first_of_user(messages: list[Message]) -> str:
    for message in messages:
        if message["role"] == "user":
            return message["content"]
    raise IFPError("There is no user message; add one.")
