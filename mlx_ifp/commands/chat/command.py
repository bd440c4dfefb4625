"""``mlx_ifp.chat``: a conversation in the terminal, which can change its task on the way."""

import argparse
import sys
from functools import partial

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...checkpoint.directory import Checkpoint
from ...cli.arguments import (
    check_given,
    check_max_tokens,
    given_selection,
    glass_of,
    kv_options,
    load_model,
    sampler_of,
    task_of,
    use_of,
)
from ...cli.streams import say
from ...errors import IFPError
from ...generation.conversation import Conversation
from ...generation.request import Request
from ...llm.messages import Message
from ...memory.budget import Use
from ..generate.command import template_kwargs
from .session import Session
from .terminal import is_terminal, piped_lines, typed_lines


def _request(
    args: argparse.Namespace, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> Request:
    """How the flags ask for answers. Its prompt is a first message, of which nothing is known."""
    if not tokenizer.has_chat_template:
        raise IFPError("This model has no chat template; use mlx_ifp.generate.")
    messages: list[Message] = [{"role": "user", "content": "hello"}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    return Request(
        messages,
        task_of(args),
        args.task_from,
        given_selection(args, checkpoint),
        args.dense,
        **glass_of(args, checkpoint),
        chat_template_kwargs=template_kwargs(args),
        prefill=args.prefill,
        options={
            "max_tokens": args.max_tokens,
            "sampler": sampler_of(args, tokenizer),
            **kv_options(args),
        },
    )


def _plan(args: argparse.Namespace, checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> Use:
    """What the first answer takes. Later ones take more, and each is checked when it is asked."""
    return use_of(args, checkpoint, tokenizer, _request(args, checkpoint, tokenizer))


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.chat``."""
    check_max_tokens(args)
    for name in ("selection", "task_name", "prefill"):
        if args.dense and getattr(args, name):
            raise IFPError(f"--dense and --{name.replace('_', '-')} exclude each other.")
    check_given(args, has_prompt=True)
    model, tokenizer = load_model(args, partial(_plan, args))
    request = _request(args, model.checkpoint, tokenizer)
    conversation = Conversation(model, tokenizer, request, args.system_prompt)
    session = Session(model, conversation, args.task_name, args.seed)
    typed, failed = is_terminal(), False
    if typed:
        name = args.model or "The model that comes with mlx_ifp"
        say(f"{name}: /help lists the commands, Ctrl-D ends the chat.")
    for line in typed_lines() if typed else piped_lines():
        try:
            if isinstance(line, IFPError):
                raise line
            session.take(line)
        except IFPError as error:
            say(f"{'' if typed else 'mlx_ifp.chat: error: '}{error}")
            failed = True
        except KeyboardInterrupt:
            # It came just before or after an answer.
            if not typed:
                raise
    if failed and not typed:
        sys.exit(1)
