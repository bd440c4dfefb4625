"""What the threads of all clients share: the models, the scheduler, the rules of access."""

import argparse
import copy
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from mlx_lm.generate import make_text_state_machine
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    ResponseGenerator,
    ToolCallFormatter,
    get_system_fingerprint,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import IFPError, one_line
from ...generation.batch import Scheduler
from ...generation.job import Segment
from ...generation.kept_prompts import PROMPT, SYSTEM
from ...generation.ticket import Ticket
from ...llm.prompt import is_messages, token_ids
from .access import Access
from .jobs import Job, Jobs
from .pieces import Reader
from .tasks_as_models import Models
from .watch import Watcher


class Service:
    """A checkpoint that is served.

    Args:
        tokenizer: of the checkpoint's LLM.
        models: its ids.
        access: who may ask.
        args: the command's options.
        scheduler: what generates.

    Attributes:
        models, access, scheduler: as above.
        jobs: makes jobs of requests.
        watcher: notices clients that go away.
        fingerprint: of the machine and the versions, for answers.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        models: Models,
        access: Access,
        args: argparse.Namespace,
        scheduler: Scheduler,
    ) -> None:
        self.models, self.access, self.scheduler = models, access, scheduler
        # Hugging Face's tokenizers are not made for several threads, and the scheduler has one.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self.jobs = Jobs(models, self._tokenizer, args, self._lock)
        self.watcher = Watcher()
        self.fingerprint = get_system_fingerprint()
        self._machine = make_text_state_machine(self._tokenizer)
        self._prompts = _Prompts(self._tokenizer)

    def decode(self, token: int) -> str:
        """The text of a token."""
        with self._lock:
            return self._tokenizer.decode([token])

    def count(self, job: Job) -> int:
        """How many tokens a prompt has."""
        return len(self._parts(job)[0])

    def ask(self, job: Job) -> tuple[Ticket, Reader]:
        """Ask for an answer.

        Returns:
            tuple: the ticket, and what reads its events.

        Raises:
            IFPError: if the request cannot be served, or too many wait.
        """
        tokens, segments, initial = self._parts(job)
        reader = self._reader(job, initial)
        sampling, left = job.sampling, (self.models.context_length or 0) - len(tokens)
        if 0 < left < sampling.max_tokens:
            # Memory is taken for as many tokens as may come, and no more fit the context.
            sampling = replace(sampling, max_tokens=left)
        ticket = self.scheduler.submit(job.request, sampling, tokens=tokens, segments=segments)
        return ticket, reader

    def _parts(self, job: Job) -> tuple[list[int], list[Segment] | None, str]:
        """A prompt's tokens, their parts that are kept, and the state its answer begins in."""
        with self._lock:
            return self._prompts.parts(job)

    def _reader(self, job: Job, initial: str) -> Reader:
        tokenizer = self._tokenizer
        formatter = None
        if job.tools and tokenizer.tool_parser is not None:
            formatter = ToolCallFormatter(tokenizer.tool_parser, job.tools, job.stream)
        return Reader(
            self._machine,
            initial,
            formatter,
            job.stops,
            set(tokenizer.eos_token_ids),
            self.decode,
            job.one_call,
        )


class _Prompts(ResponseGenerator):
    """Finds the parts of prompts as mlx-lm's server does, with its code; it generates nothing."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        # mlx-lm's own constructor starts a thread that loads a model.
        self._tokenizer = tokenizer
        options = SimpleNamespace(chat_template_args={})
        self.model_provider = cast(Any, SimpleNamespace(processor=None, cli_args=options))

    def parts(self, job: Job) -> tuple[list[int], list[Segment] | None, str]:
        """The tokens, their parts, and the state in which the answer begins."""
        tokenizer, request = self._tokenizer, job.request
        prompt = request.prompt
        # What the assistant has begun to say is continued; mlx-lm would begin a new turn.
        if not is_messages(prompt) or prompt[-1]["role"] == "assistant":
            encoded = request.encode(tokenizer)
            ids = tokenizer.encode(encoded) if isinstance(encoded, str) else token_ids(encoded)
            return ids, None, "normal"
        if not tokenizer.has_chat_template:
            raise IFPError("This model has no chat template; ask /v1/completions.")
        kwargs = dict(request.chat_template_kwargs)
        tools = kwargs.pop("tools", None)
        asked = CompletionRequest("chat", "", [dict(m) for m in prompt], tools, None)
        args = cast(GenerationArguments, SimpleNamespace(chat_template_kwargs=kwargs))
        with one_line("The chat template does not take these messages"):
            tokens, parts, kinds, initial, _ = self._tokenize(tokenizer, asked, args)
        if not tokens:
            raise IFPError("The chat template makes nothing of these messages.")
        kept = [kind if kind in (SYSTEM, PROMPT) else None for kind in kinds]
        return tokens, list(zip(parts, kept, strict=True)), initial
