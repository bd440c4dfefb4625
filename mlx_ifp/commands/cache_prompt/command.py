"""``mlx_ifp.cache_prompt``: run a prompt once and keep its keys and values in a file."""

import argparse
import sys
from functools import partial
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ...checkpoint.directory import Checkpoint
from ...cli.arguments import (
    check_given,
    given_selection,
    glass_of,
    kv_options,
    load_model,
    note_prefill,
    read_prompt,
    task_of,
    use_of,
)
from ...errors import IFPError
from ...files.atomic import check_writable
from ...generation.request import Request
from ...generation.stream import Answer
from ...memory.budget import Use
from ...prompt_cache.files import save_cache_file
from ...selection.files import save_selection


def _request(
    args: argparse.Namespace, prompt: str, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> Request:
    """The prompt as the beginning of a user's message."""
    return Request(
        [{"role": "user", "content": prompt}],
        task_of(args),
        args.task_from,
        given_selection(args, checkpoint),
        **glass_of(args, checkpoint),
        ignore_chat_template=not tokenizer.has_chat_template,
        to_be_continued=True,
        prefill=args.prefill,
        options={"max_tokens": 0, **kv_options(args)},
    )


def _plan(
    args: argparse.Namespace, prompt: str, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> Use:
    """What is going to be run, known before any weight is read."""
    return use_of(args, checkpoint, tokenizer, _request(args, prompt, checkpoint, tokenizer))


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.cache_prompt``."""
    check_given(args, has_prompt=True)
    prompt = read_prompt(args.prompt)
    path = Path(args.prompt_cache_file)
    if path.suffix != ".safetensors":
        # mlx adds the suffix by itself, and the file would not be where the user looks.
        raise IFPError(f"--prompt-cache-file must end in .safetensors, {path} does not.")
    check_writable(path)
    model, tokenizer = load_model(args, partial(_plan, args, prompt))
    answer = Answer(model, tokenizer, _request(args, prompt, model.checkpoint, tokenizer))
    note_prefill(args, model.checkpoint, answer.prefill)
    # Where the whole model reads, nothing is selected unless it is asked for.
    if args.save_selection is not None and answer.selection is not None:
        save_selection(args.save_selection, answer.selection)
    count = len(answer.tokens)
    with tqdm(total=count, unit="tokens", desc="Processing") as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        prompt_cache = answer.fill(show)
    metadata = {"model": str(args.model or model.checkpoint.path), "tokenizer_config": "{}"}
    save_cache_file(path, prompt_cache, answer.key, metadata)
    print(f"{path}: {count} tokens", file=sys.stderr)
