"""``mlx_ifp.cache_prompt``: run a prompt once and keep its keys and values in a file."""

import argparse
import collections
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ...checkpoint.directory import Checkpoint
from ...cli.arguments import check_given, given_selection, load_model, read_prompt, task_of, use_of
from ...errors import IFPError
from ...files.atomic import check_writable, new_file
from ...llm.kv_cache import Generation
from ...memory.budget import Use
from ...selection.files import save_selection
from ...selectors.text import selecting_text


def _tokens(tokenizer: TokenizerWrapper, messages: list[dict[str, Any]]) -> list[int]:
    if not tokenizer.has_chat_template:
        return tokenizer.encode(messages[0]["content"])
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, continue_final_message=True
    )


def _plan(
    args: argparse.Namespace,
    messages: list[dict[str, Any]],
    task: str | None,
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
) -> Use:
    """What is going to be run, known before any weight is read."""
    generation = Generation.of(len(_tokens(tokenizer, messages)), 0, **vars(args))
    return use_of(args, checkpoint, tokenizer, generation, messages, task)


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.cache_prompt``."""
    check_given(args)
    prompt = read_prompt(args.prompt)
    path = Path(args.prompt_cache_file)
    if path.suffix != ".safetensors":
        # mlx adds the suffix by itself, and the file would not be where the user looks.
        raise IFPError(f"--prompt-cache-file must end in .safetensors, {path} does not.")
    check_writable(path)
    task = task_of(args)
    messages = [{"role": "user", "content": prompt}]
    model, tokenizer = load_model(args, partial(_plan, args, messages, task))
    if (selection := given_selection(args, model.checkpoint)) is not None:
        ready = model.prepare(selection=selection)
    else:
        role = args.task_from or model.checkpoint.ifp.text.source
        ready = model.prepare(task if task is not None else selecting_text(messages, role))
    if args.save_selection is not None:
        save_selection(args.save_selection, ready.selection)
    tokens = _tokens(tokenizer, messages)
    prompt_cache = make_prompt_cache(ready.network, args.max_kv_size)
    with tqdm(total=len(tokens), unit="tokens", desc="Processing") as bar:
        steps = generate_step(
            mx.array(tokens),
            ready.network,
            max_tokens=0,
            prompt_cache=prompt_cache,
            prefill_step_size=args.prefill_step_size,
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            prompt_progress_callback=lambda done, _: bar.update(done - bar.n),
        )
        try:
            collections.deque(steps, maxlen=0)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise IFPError(f"The prompt could not be processed: {error}") from error
    metadata = {
        "model": str(args.model or model.checkpoint.path),
        "tokenizer_config": "{}",
        "ifp_selection": ready.selection.digest,
    }
    with new_file(path) as temporary:
        try:
            save_prompt_cache(str(temporary), prompt_cache, metadata)
        except RuntimeError as error:
            raise IFPError(f"{path} could not be written: {error}") from error
    print(f"{path}: {len(tokens)} tokens", file=sys.stderr)
