"""Checked fields -> a job: what selects, how tokens are chosen, and how the answer is given."""

import argparse
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from mlx_lm.generate import make_stop_sequences
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...checkpoint.config import TEXT_SOURCES
from ...choices import PREFILLS
from ...cli.arguments import kv_options
from ...generation.request import Request
from ...generation.sampling import Sampling
from ...llm.kv_cache import KVSettings
from ...llm.prompt import Prompt, is_messages
from . import checks
from .checks import MAX_SEED, Check, boolean, integer, number, only, string
from .failures import bad_request
from .structured import Structured
from .tasks_as_models import Choice, Models

_MAX_TOKENS = 1 << 20
_CONTEXT = integer(0, _MAX_TOKENS)

# Fields of every request for an answer, in OpenAI's words and mlx-lm's, and ours.
FIELDS: dict[str, Check] = {
    "model": string,
    "stream": boolean,
    "stream_options": checks.json_object,
    "max_tokens": integer(1),
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "top_k": integer(-1, 1 << 31),
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 100),
    "repetition_context_size": _CONTEXT,
    "presence_penalty": number(-100, 100),
    "presence_context_size": _CONTEXT,
    "frequency_penalty": number(-100, 100),
    "frequency_context_size": _CONTEXT,
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 1),
    "logit_bias": checks.logit_bias,
    "stop": checks.stops,
    "seed": integer(0, MAX_SEED),
    "n": only(1),
    "task": string,
    "keep": checks.keep,
    "selector": string,
    "selection_from": only(*TEXT_SOURCES),
    "prefill": only(*PREFILLS),
    # These say who asks, and how OpenAI's service bills, stores and caches.
    "user": checks.ignored,
    "metadata": checks.ignored,
    "safety_identifier": checks.ignored,
    "prompt_cache_key": checks.ignored,
    "prompt_cache_retention": checks.ignored,
    "service_tier": only("auto", "default"),
    "store": only(False),
}
# They choose channels, which a task or the whole model has chosen already.
_CHOOSING = ("task", "keep", "selector", "selection_from")


@dataclass(frozen=True)
class Job:
    """A request that was read.

    Attributes:
        choice: the model that is asked.
        request: what is generated.
        sampling: how.
        stops: texts that end the answer.
        tools: functions that the model may call, in OpenAI's form, or None.
        one_call: the answer ends after its first tool call.
        stream: the answer is given piece by piece.
        include_usage: a stream ends with the usage.
        chat: it is a conversation, and no text to be continued.
        prefill: who reads the prompt: ``dense``, the whole model, or ``pruned``, the sub-network.
    """

    choice: Choice
    request: Request
    sampling: Sampling
    stops: list[str]
    tools: list[dict[str, Any]] | None = None
    one_call: bool = False
    stream: bool = False
    include_usage: bool = False
    chat: bool = True
    prefill: str = "pruned"


@dataclass
class Jobs:
    """Makes jobs for one server.

    Args:
        models: what can be asked.
        tokenizer: of the LLM, for the threads of clients.
        defaults: the command's options.
        lock: to be held while the tokenizer reads.
    """

    models: Models
    tokenizer: TokenizerWrapper
    defaults: argparse.Namespace
    lock: threading.Lock
    structured: Structured = field(init=False)

    def __post_init__(self) -> None:
        """Prepare what all jobs share."""
        self.structured = Structured(self.tokenizer)
        specials = (*self.tokenizer.encode("\n"), *self.tokenizer.eos_token_ids)

        # Requests that sample alike share a sampler, so that mlx-lm samples for them at once.
        @lru_cache(maxsize=64)
        def sampler(temp: float, xtc: float, threshold: float, **kwargs: Any) -> Any:
            if temp == 0:
                return None
            return make_sampler(
                temp,
                xtc_probability=xtc,
                xtc_threshold=threshold,
                xtc_special_tokens=list(specials),
                **kwargs,
            )

        self._sampler = sampler

    def job(self, fields: Mapping[str, Any], prompt: Prompt, *, chat: bool = True) -> Job:
        """Make a job of fields that were checked.

        Args:
            fields (dict): those of :data:`FIELDS`, and for a chat also ``tools``,
                ``parallel_tool_calls``, ``chat_template_kwargs`` and ``response_format``.
            prompt: a text, or messages.
            chat (bool): the prompt is messages.

        Raises:
            Failure: if fields contradict each other, or the model cannot do what they ask for.
            IFPError: if the prompt or a task cannot be used.
        """
        choice = self.models.find(fields.get("model"))
        if choice.dense or choice.task is not None:
            for name in _CHOOSING:
                if name in fields:
                    message = (
                        f"{name} has no effect on {choice.id}, whose channels are chosen; ask "
                        f"{self.models.name} instead."
                    )
                    raise bad_request(message, name)
        tools = fields.get("tools")
        if tools and not self.tokenizer.has_tool_calling:
            raise bad_request("This model's chat template knows no tools.", "tools")
        template = dict(self.defaults.chat_template_args) if chat else {}
        template |= fields.get("chat_template_kwargs", {})
        processor = None
        if "response_format" in fields:
            processor = self.structured.processor(fields["response_format"])
            if processor is not None:
                # A grammar rules every token, and thoughts are no JSON.
                template["enable_thinking"] = False
        if tools:
            template["tools"] = tools
        stops = fields.get("stop", [])
        warm = self.defaults.warm_system_prompt and _has_system(prompt)
        request = Request(
            prompt,
            task=fields.get("task"),
            task_from=fields.get("selection_from"),
            selection=choice.selection,
            dense=choice.dense,
            selector=fields.get("selector"),
            keep=fields.get("keep"),
            chat_template_kwargs=template,
            warm=warm,
            warm_on_disk=warm,
            # The whole model reads its own prompts.
            prefill=fields.get("prefill", None if choice.dense else self.defaults.prefill),
            options=asdict(KVSettings.of(kv_options(self.defaults))),
        )
        model = self.models.model
        stream_options = fields.get("stream_options", {})
        return Job(
            choice,
            request,
            self._sampling(fields, stops, processor),
            stops,
            tools,
            one_call=not fields.get("parallel_tool_calls", True),
            stream=fields.get("stream", False),
            include_usage=boolean("include_usage", stream_options.get("include_usage") or False),
            chat=chat,
            prefill="dense"
            if choice.dense
            else request.prefill_by(model.checkpoint, model.selector),
        )

    def _sampling(self, fields: Mapping[str, Any], stops: list[str], processor: Any) -> Sampling:
        defaults = self.defaults
        # Some clients switch top-k off with -1.
        top_k = fields.get("top_k", defaults.top_k)
        sampler = self._sampler(
            fields.get("temperature", defaults.temp),
            fields.get("xtc_probability", 0.0),
            fields.get("xtc_threshold", 0.1),
            top_p=fields.get("top_p", defaults.top_p),
            min_p=fields.get("min_p", defaults.min_p),
            top_k=top_k if 0 < top_k < len(self.tokenizer) else 0,
        )
        processors = make_logits_processors(
            self._biases(fields),
            fields.get("repetition_penalty", 0.0),
            fields.get("repetition_context_size", 20),
            fields.get("presence_penalty", 0.0),
            fields.get("presence_context_size", 20),
            fields.get("frequency_penalty", 0.0),
            fields.get("frequency_context_size", 20),
        )
        if processor is not None:
            # The grammar has the last word.
            processors.append(processor)
        most = fields.get("max_tokens", defaults.max_tokens)
        with self.lock:
            stop = make_stop_sequences(self.tokenizer, stops)
        return Sampling(
            # Clients that know no limit ask for millions; no answer is longer than the context.
            max_tokens=min(most, self.models.context_length or _MAX_TOKENS),
            sampler=sampler,
            logits_processors=tuple(processors),
            stop=stop,
            seed=fields.get("seed"),
            logprobs=fields.get("logprobs", False),
            top_logprobs=fields.get("top_logprobs", 0),
        )

    def _biases(self, fields: Mapping[str, Any]) -> dict[int, float] | None:
        biases = fields.get("logit_bias")
        if biases and max(biases) >= len(self.tokenizer):
            message = f"logit_bias has a token that is not there: {max(biases)}."
            raise bad_request(message, "logit_bias")
        return biases or None


def _has_system(prompt: Prompt) -> bool:
    return is_messages(prompt) and prompt[0]["role"] == "system"
