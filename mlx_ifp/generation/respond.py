"""What mlx-lm's HTTP handler asks for answers, on top of a :class:`Scheduler`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import make_sampler
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
    ResponseGenerator,
    SamplingArguments,
    _make_logits_processors,
)

from ..llm.messages import read_messages
from ..llm.prompt import token_ids
from ..subnetwork.prepared import Prepared
from .batch import Scheduler
from .job import Segment
from .kept_prompts import PROMPT, SYSTEM
from .request import Request
from .sampling import Sampler, Sampling
from .ticket import Progress, Ticket

# How often an owner is asked whether it still waits.
PATIENCE = 0.25
# Without a token for so many seconds a sign of life is given.
KEEP_ALIVE = 2.0


class GoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class IFPCompletionRequest(CompletionRequest):
    """mlx-lm's request, with what selects.

    Attributes:
        choice: fields of :class:`Request` about the selection: ``task``, ``task_from``,
            ``selection``, ``dense``, ``selector``, ``keep``, ``prefill``, ``warm``,
            ``warm_on_disk``.
        options: options of :class:`Request` about keys and values.
        logits_processors: more of them, such as those of a grammar.
        waits: says whether the client still waits; None if nobody knows.
    """

    choice: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    logits_processors: tuple[Any, ...] = ()
    waits: Callable[[], bool] | None = None


@dataclass
class IFPContext(GenerationContext):
    """mlx-lm's context of an answer, with the ticket behind it."""

    ticket: Ticket | None = None

    def stop(self) -> None:
        """Give up the answer's place, if it has not ended."""
        super().stop()
        if self.ticket is not None and not self.ticket.over:
            self.ticket.cancel()

    @property
    def report(self) -> dict[str, Any]:
        """What was selected, from where, and what it cost, for an answer's ``mlx_ifp``."""
        ticket = self.ticket
        return {} if ticket is None or ticket.ready is None else report(ticket, ticket.ready)


def report(ticket: Ticket, ready: Prepared) -> dict[str, Any]:
    """What an answer's owner is told about its sub-network."""
    selection = ready.selection
    said: dict[str, Any] = {
        "selection": "dense" if selection is None else selection.digest,
        "source": ready.source,
        "select_seconds": ready.select_seconds,
        "load_seconds": ready.load_seconds,
        "bytes_read": ready.bytes_read,
        "channels_reused": ready.channels_reused,
        "waited_seconds": ticket.waited_seconds,
        "cached_tokens": ticket.cached_tokens,
    }
    if selection is not None:
        said |= {
            "k": selection.k,
            "share": sum(selection.ks) / (len(selection.ks) * selection.d_ffn),
        }
    if ready.reuse_overlap is not None:
        said["reuse_overlap"] = ready.reuse_overlap
    return said


class GroupedResponseGenerator(ResponseGenerator):
    """Stands in the place of mlx-lm's ``ResponseGenerator``, which serves one model at a time.

    It reads requests, makes tokens and state machines as mlx-lm does; a scheduler generates.

    Args:
        scheduler (Scheduler): what generates; :meth:`stop_and_join` closes it.
        cli_args: an object with mlx-lm's ``chat_template_args``; the handler reads more of it.
        grace (float): seconds that running answers get when the server stops.
    """

    def __init__(self, scheduler: Scheduler, cli_args: Any, grace: float = 5.0) -> None:
        # mlx-lm's own constructor starts a thread that loads and runs models.
        self.scheduler = scheduler
        self.model_provider = cast(Any, _Provider(cli_args))
        self.grace = grace
        self._state_machine_cache: dict[Any, Any] = {}

    def generation_available(self) -> bool:
        """Whether requests are served."""
        return self.scheduler.alive

    def stop_and_join(self) -> None:
        """Serve no more requests, give those that run some seconds, and end the threads."""
        self.scheduler.close(self.grace)

    def join(self) -> None:
        """Nothing to wait for: the scheduler's threads end in :meth:`stop_and_join`."""

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[IFPContext, Iterator[Response]]:
        """Ask for an answer, as mlx-lm's handler does.

        It returns when the selection is there, so errors of the request are raised here.

        Args:
            request (CompletionRequest): an :class:`IFPCompletionRequest` says what selects; with
                mlx-lm's own the prompt does.
            generation_args (GenerationArguments): mlx-lm's; the model's id is not read.
            progress_callback (Callable): called with the tokens processed and all, while a prompt
                is processed, and again if nothing else happens for :data:`KEEP_ALIVE` seconds.

        Raises:
            IFPError: if the request cannot be served; see also :meth:`Scheduler.submit`.
            GoneError: if nobody waits for the answer any more.
        """
        tokenizer = self.scheduler.tokenizer
        asked, tokens, segments, state = self._read(request, generation_args)
        stop, text_sm = self._make_state_machine(None, tokenizer, generation_args.stop_words)
        waits = getattr(request, "waits", None) or (lambda: True)
        sampling = self._sampling(request, generation_args, stop)
        ticket = self.scheduler.submit(asked, sampling, tokens=tokens, segments=segments)
        try:
            while not ticket.wait(PATIENCE):
                if not waits():
                    raise GoneError
        except BaseException:
            ticket.cancel()
            raise
        context = IFPContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=text_sm,
            initial_state=state,
            prompt=tokens,
            prompt_cache_count=ticket.cached_tokens,
            ticket=ticket,
        )
        return context, self._responses(ticket, progress_callback or (lambda *_: None), waits)

    def _responses(
        self, ticket: Ticket, progress: Callable[[int, int], None], waits: Callable[[], bool]
    ) -> Iterator[Response]:
        quiet = 0.0
        last = None
        try:
            for event in ticket.events(PATIENCE):
                if not waits():
                    raise GoneError
                if isinstance(event, Progress):
                    # The same progress once more says that nothing has happened.
                    quiet = quiet + PATIENCE if event is last else KEEP_ALIVE
                    last = event
                    if quiet >= KEEP_ALIVE:
                        quiet = 0.0
                        progress(event.done, event.total)
                    continue
                yield Response(
                    event.text,
                    event.id,
                    event.logprob if event.logprob is not None else 0.0,
                    event.finish_reason,
                    cast(Any, event.top),
                )
        finally:
            if not ticket.over:
                ticket.cancel()

    def _read(
        self, request: CompletionRequest, args: GenerationArguments
    ) -> tuple[Request, list[int], list[Segment] | None, str]:
        """The request as ours, its tokens, their parts, and the state its answer begins in."""
        tokenizer = self.scheduler.tokenizer
        choice = dict(getattr(request, "choice", {}))
        options = dict(getattr(request, "options", {}))
        if request.request_type != "chat":
            asked = Request(request.prompt, options=options, **choice)
            return asked, tokenizer.encode(request.prompt), None, "normal"
        request.messages = read_messages(request.messages)
        kwargs = self.cli_args.chat_template_args | (args.chat_template_kwargs or {})
        if request.tools:
            kwargs["tools"] = request.tools
        asked = Request(request.messages, chat_template_kwargs=kwargs, options=options, **choice)
        if request.messages[-1]["role"] == "assistant" and tokenizer.has_chat_template:
            # mlx-lm would begin a new turn; what the assistant has begun to say is continued.
            ids = cast(list[int], asked.encode(tokenizer))
            return asked, token_ids(ids), None, "normal"
        tokens, parts, kinds, state, _ = self._tokenize(tokenizer, request, args)
        kept = [kind if kind in (SYSTEM, PROMPT) else None for kind in kinds]
        return asked, tokens, list(zip(parts, kept, strict=True)), state

    def _sampling(
        self, request: CompletionRequest, args: GenerationArguments, stop: StopSequences
    ) -> Sampling:
        more = getattr(request, "logits_processors", ())
        return Sampling(
            max_tokens=args.max_tokens,
            sampler=self._sampler(args.sampling),
            logits_processors=(*_make_logits_processors(args), *more),
            stop=stop,
            seed=args.seed,
            logprobs=args.logprobs,
            top_logprobs=max(0, args.top_logprobs),
        )

    def _sampler(self, args: SamplingArguments) -> Sampler | None:
        """The sampler, the same object for the same arguments: mlx-lm samples for these at once."""
        if args.temperature == 0:
            return None
        tokenizer = self.scheduler.tokenizer
        return _sampler(
            args.temperature,
            args.top_p,
            args.min_p,
            args.top_k,
            args.xtc_probability,
            args.xtc_threshold,
            (*tokenizer.encode("\n"), *sorted(tokenizer.eos_token_ids)),
        )


@dataclass
class _Provider:
    """What mlx-lm's ``ResponseGenerator`` reads of its ``ModelProvider``."""

    cli_args: Any
    # Images are not read.
    processor: None = None


@lru_cache(maxsize=64)
def _sampler(
    temp: float,
    top_p: float,
    min_p: float,
    top_k: int,
    xtc_probability: float,
    xtc_threshold: float,
    xtc_special_tokens: tuple[int, ...],
) -> Sampler:
    return make_sampler(
        temp,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=list(xtc_special_tokens),
    )
