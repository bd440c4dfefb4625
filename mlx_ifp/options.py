"""Command-line options that several commands share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

# A private name, but what mlx-lm's own options of this kind are read with.
from mlx_lm.utils import _parse_size

from .atomic import check_writable
from .budget import Estimator, Use, table
from .checkpoint import Checkpoint
from .config import SELECTORS, TEXT_SOURCES
from .device import default_dtype
from .errors import IFPError
from .keep import Keep, resolve_keep
from .kv_size import Generation
from .masks import Selection
from .memory_limit import check
from .model import IFPModel, open_model
from .selections import SelectionCache, load_selection
from .task_library import Task, TaskLibrary
from .text import selecting_text, selector_tokens
from .tokenizers import load_predictor_tokenizer

# What mx.quantize takes.
KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)


def parse_keep(text: str) -> Keep:
    """``768`` is a count, ``0.5`` or ``50%`` a fraction, ``768,704,...`` one count a layer."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        if "," in text:
            return [int(part) for part in text.split(",")]
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no count such as 768, fraction such as 0.5, or list of counts"
        ) from None


def parse_seed(text: str) -> int:
    """A seed that MLX takes: 64 bits, no sign."""
    if not text.isdecimal() or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 2**64 - 1")
    return int(text)


def parse_number(text: str) -> int:
    """A number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return int(text)


def parse_count(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def parse_size(text: str) -> int:
    """``6GB``, ``800MB`` or bytes, as mlx-lm reads sizes: a GB is 10^9 bytes."""
    try:
        size = _parse_size(text)
    except (KeyError, ValueError, ArithmeticError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 6GB, 800MB or 800000000")
    return size


def add_checkpoint_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which checkpoint, and where what belongs to it is kept."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="A checkpoint of mlx_ifp.convert or mlx_ifp.train: a directory or a hub id (default: "
        "the small one that comes with mlx_ifp)",
    )
    group.add_argument("--revision", help="Revision of the hub repository")
    group.add_argument("--cache-dir", help="Where selections and named tasks are kept on disk")
    return group


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and how it is used."""
    group = add_checkpoint_options(parser)
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run code of the model's repository",
    )
    group.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="Run in this type (default: as stored; float32 on a CPU)",
    )
    group.add_argument(
        "--keep",
        type=parse_keep,
        metavar="K|FRACTION",
        help="FFN channels to keep in each layer (default: what the checkpoint says)",
    )
    group.add_argument("--selector", choices=SELECTORS, help="What scores the channels")
    group.add_argument(
        "--no-cache", action="store_true", help="Neither read nor write selections on disk"
    )


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """What selects."""
    group = parser.add_argument_group("task").add_mutually_exclusive_group()
    group.add_argument("--task", metavar="TEXT", help="A description of the task, which selects")
    group.add_argument("--task-file", metavar="FILE", help="A file with such a description")
    group.add_argument(
        "--task-from",
        choices=TEXT_SOURCES,
        help="Which message selects if no task is given (default: what the checkpoint says, "
        "usually the user's)",
    )
    group.add_argument("--selection", metavar="FILE", help="Use a saved selection")
    add_task_name_option(group)
    parser.add_argument("--save-selection", metavar="FILE", help="Save the selection that is used")


def add_task_name_option(group: argparse._ActionsContainer) -> None:
    """A task of the library selects."""
    group.add_argument("--task-name", metavar="NAME", help="Use a task of mlx_ifp.tasks")


def add_reuse_option(group: argparse._ActionsContainer, what: str) -> None:
    """How alike another selection must be to be used instead; ``what`` says which are at hand."""
    group.add_argument("--reuse-overlap", type=float, metavar="OVERLAP", help=what)


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """How keys and values are kept."""
    group = parser.add_argument_group("key-value cache")
    group.add_argument(
        "--max-kv-size", type=parse_count, help="Maximum size of the key-value cache"
    )
    group.add_argument(
        "--kv-bits", type=int, choices=KV_BITS, help="Bits for the quantized key-value cache"
    )
    group.add_argument(
        "--kv-group-size", type=int, choices=KV_GROUP_SIZES, default=64, help="Its group size"
    )
    group.add_argument(
        "--quantized-kv-start",
        type=parse_number,
        default=5000,
        help="Tokens before it is quantized",
    )
    group.add_argument(
        "--prefill-step-size",
        type=parse_count,
        default=2048,
        help="Prompt tokens to process at a time",
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """How much memory may be used."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory-limit",
        type=parse_size,
        metavar="SIZE",
        help="Bytes that trunk, predictor, sub-networks, keys and values may take together, such "
        "as 6GB or 800MB (a GB is 10^9 bytes). What does not fit is refused before it is read",
    )
    group.add_argument(
        "--estimate-only",
        action="store_true",
        help="Print what would be in memory, and read no weights",
    )
    group.add_argument(
        "--cached-tasks",
        type=parse_count,
        default=1,
        metavar="N",
        help="Sub-networks that must fit into memory together (default: 1)",
    )


def use_of(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
    generation: Generation,
    messages: list[dict[str, Any]],
    task: str | None,
) -> Use:
    """What the options are going to use a checkpoint for.

    Args:
        args: the options.
        checkpoint: what they name.
        tokenizer: of its LLM.
        generation: lengths, and how keys and values are kept.
        messages: the prompt, which selects if nothing else does.
        task: a description that selects, or None.
    """
    if getattr(args, "dense", False):
        return Use(checkpoint.d_ffn, generation, networks=args.cached_tasks, dense=True)
    if (selection := given_selection(args, checkpoint)) is not None:
        return Use(selection.ks, generation, networks=args.cached_tasks)
    k = checkpoint.ifp.k
    if args.keep is not None:
        k = resolve_keep(args.keep, checkpoint.d_ffn, len(checkpoint.ffns))
    selector = checkpoint.checked_selector(args.selector or checkpoint.ifp.selector)
    if selector == "predictor" and checkpoint.ifp.predictor_embedding == "own":
        tokenizer = load_predictor_tokenizer(checkpoint, _tokenizer_config(args))
    text = task
    if task is None:
        text = selecting_text(messages, args.task_from or checkpoint.ifp.text.source)
    tokens = selector_tokens(tokenizer, text, checkpoint.ifp.text)
    return Use(k, generation, selector, len(tokens), args.cached_tasks)


def task_of(args: argparse.Namespace) -> str | None:
    """The task description of the command line, or None."""
    if args.task_file is None:
        try:
            # Undecodable bytes of a command line come as surrogates.
            (args.task or "").encode()
        except UnicodeEncodeError as error:
            raise IFPError("The task is not UTF-8 text.") from error
        return args.task
    try:
        return Path(args.task_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise IFPError(f"{args.task_file} is not a text file.") from error


def check_given(args: argparse.Namespace) -> None:
    """Raises IFPError if options contradict a selection that is given, or none can be saved.

    To be called before anything is loaded; a command need not have all of these options.
    """
    for given in ("selection", "task_name", "dense"):
        for name in ("keep", "selector"):
            # A selection has its channels; nothing scores or counts them anew.
            if getattr(args, given, None) and getattr(args, name) is not None:
                raise IFPError(f"--{given.replace('_', '-')} and --{name} exclude each other.")
    if getattr(args, "save_selection", None) is not None:
        if getattr(args, "dense", False):
            raise IFPError("--dense selects nothing to save.")
        check_writable(args.save_selection)


def named_task(args: argparse.Namespace, checkpoint: Checkpoint) -> Task:
    """The task that ``--task-name`` names."""
    return TaskLibrary(checkpoint, args.cache_dir).load(args.task_name)


def given_selection(args: argparse.Namespace, checkpoint: Checkpoint) -> Selection | None:
    """The selection of ``--selection`` or ``--task-name``; None if a text selects."""
    if args.task_name is not None:
        return named_task(args, checkpoint).selection
    if args.selection is not None:
        return load_selection(args.selection, checkpoint.digest)
    return None


def _tokenizer_config(args: argparse.Namespace) -> dict[str, bool]:
    return {"trust_remote_code": args.trust_remote_code}


def load_model(
    args: argparse.Namespace,
    plan: Callable[[Checkpoint, TokenizerWrapper], Use] | None = None,
) -> tuple[IFPModel, TokenizerWrapper]:
    """Load the checkpoint that the options name.

    Args:
        args: the options.
        plan: of a command with :func:`add_memory_options`, what it is going to use the checkpoint
            for. With ``--estimate-only`` that is printed, and the process ends.

    Raises:
        IFPError: if it does not fit the memory limit; no weight has been read then.
    """
    checkpoint, tokenizer = open_model(args.model, _tokenizer_config(args), args.revision)
    dtype = getattr(mx, args.dtype) if args.dtype else default_dtype()
    limit = use = None
    if plan is not None and (args.memory_limit is not None or args.estimate_only):
        limit, use = args.memory_limit, plan(checkpoint, tokenizer)
    if use is not None and args.estimate_only:
        estimator = Estimator(checkpoint, dtype)
        print(table(estimator, use, limit), flush=True)
        if limit is not None:
            check(estimator, use, limit)
        sys.exit(0)
    if limit is not None:
        # So that MLX gives freed buffers back before it exceeds the limit.
        mx.set_memory_limit(limit)
    model = IFPModel(
        checkpoint,
        tokenizer,
        dtype=dtype,
        keep=args.keep,
        selector=args.selector,
        selection_cache=None if args.no_cache else SelectionCache(args.cache_dir),
        tokenizer_config=_tokenizer_config(args),
        task_library=TaskLibrary(checkpoint, args.cache_dir),
        reuse_overlap=getattr(args, "reuse_overlap", None),
        memory_limit=limit,
        use=use,
    )
    return model, tokenizer
