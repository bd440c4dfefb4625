"""Command-line options that several commands share."""

import argparse
import json
import re
from decimal import Decimal
from typing import Any

from ..checkpoint.config import TEXT_SOURCES
from ..choices import DTYPES, PREFILLS, Q_BITS, Q_GROUP_SIZES, SELECTORS, STATISTICS
from ..selection.keep import Keep

_SIZES = {"": 1, "M": 10**6, "G": 10**9}


def parse_bool(text: str) -> bool:
    """``False`` or ``F``, in any case of letters, is false; all else is true, as in mlx-lm."""
    return text.lower() not in ("false", "f")


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


def parse_share(text: str) -> float:
    """Read a number from 0 to 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return share


def parse_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def parse_seed(text: str) -> int:
    """Read a seed that MLX takes: 64 bits without a sign."""
    if not text.isdecimal() or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 2**64 - 1")
    return int(text)


def parse_number(text: str) -> int:
    """Read a number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return int(text)


def parse_count(text: str) -> int:
    """Read a number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def parse_size(text: str) -> int:
    """``6GB``, ``800MB`` or bytes, as mlx-lm reads sizes: a GB is 10^9 bytes."""
    try:
        found = re.fullmatch(r"([\d.]*)\s*(|M|MB|G|GB)\s*", text.upper())
        size = int(Decimal(found[1]) * _SIZES[found[2][:1]]) if found else 0
    except (ValueError, ArithmeticError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 6GB, 800MB or 800000000")
    return size


def new_parser(
    name: str, description: str, examples: str, **kwargs: Any
) -> argparse.ArgumentParser:
    """The empty parser of ``mlx_ifp.NAME``, with examples below its help.

    Args:
        name: the command's.
        description: what it does, in one sentence.
        examples: shown as they are written.
        **kwargs: passed to argparse.
    """
    return argparse.ArgumentParser(
        prog=f"mlx_ifp.{name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )


def add_trust_option(group: argparse._ActionsContainer) -> None:
    """Add the flag that lets code of the model's repository run."""
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run code of the model's repository",
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that name a checkpoint, and where its selections and tasks are kept."""
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
    """Add the flags that name a checkpoint, and say how it is used."""
    group = add_checkpoint_options(parser)
    add_trust_option(group)
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Run in this type (default: as stored; float32 on a CPU)",
    )
    group.add_argument(
        "--keep",
        type=parse_keep,
        metavar="K|FRACTION",
        help="FFN channels to keep in each layer (default: what the checkpoint says)",
    )
    add_by_layer_option(group)
    group.add_argument("--selector", choices=SELECTORS, help="What scores the channels")
    group.add_argument(
        "--statistic",
        choices=STATISTICS,
        help="What of the activations counts, for activations, glass and tasks from examples "
        "(default: griffin)",
    )
    group.add_argument(
        "--blend",
        type=parse_share,
        metavar="SHARE",
        help="The prompt's weight in the selector glass, 0 to 1; the rest is the prior's, or that "
        "of the task from examples (default: what the checkpoint says, usually 0.5)",
    )
    group.add_argument(
        "--no-cache", action="store_true", help="Neither read nor write selections on disk"
    )


def add_by_layer_option(group: argparse._ActionsContainer) -> None:
    """Add the flag that lets one threshold decide how many channels each layer keeps."""
    group.add_argument(
        "--keep-by-layer",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Let one threshold over all layers say how many channels each keeps; their mean is "
        "--keep (default: what the checkpoint says, usually not)",
    )


def add_task_options(parser: argparse.ArgumentParser, *, save: bool = True) -> None:
    """Add the flags that say what selects, and the one that saves the selection if ``save``."""
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
    if save:
        parser.add_argument(
            "--save-selection", metavar="FILE", help="Save the selection that is used"
        )


def add_task_name_option(group: argparse._ActionsContainer) -> None:
    """Add the flag that lets a task of the library select."""
    group.add_argument("--task-name", metavar="NAME", help="Use a task of mlx_ifp.tasks")


def add_prefill_option(group: argparse._ActionsContainer) -> None:
    """Add the flag that says who reads the prompt."""
    group.add_argument(
        "--prefill",
        choices=PREFILLS,
        help="Who reads the prompt: the whole model, layer by layer from disk, or the sub-network "
        "that answers (default: what suits the selector)",
    )


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how keys and values are kept."""
    group = parser.add_argument_group("key-value cache")
    group.add_argument(
        "--max-kv-size", type=parse_count, help="Maximum size of the key-value cache"
    )
    group.add_argument(
        "--kv-bits", type=int, choices=Q_BITS, help="Bits for the quantized key-value cache"
    )
    group.add_argument(
        "--kv-group-size", type=int, choices=Q_GROUP_SIZES, default=64, help="Its group size"
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


def add_sampling_options(
    parser: argparse.ArgumentParser, max_tokens: int
) -> argparse._ArgumentGroup:
    """Add the flags that say how tokens are chosen, and how many at most unless it is said."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-tokens", "-m", type=int, default=max_tokens, help="Tokens to generate"
    )
    group.add_argument("--temp", type=float, default=0.0, help="Sampling temperature")
    group.add_argument("--top-p", type=float, default=1.0, help="Sampling top-p")
    group.add_argument("--min-p", type=float, default=0.0, help="Sampling min-p")
    group.add_argument("--top-k", type=int, default=0, help="Sampling top-k")
    group.add_argument("--xtc-probability", type=float, default=0.0, help="XTC probability")
    group.add_argument("--xtc-threshold", type=float, default=0.1, help="XTC threshold")
    group.add_argument(
        "--min-tokens-to-keep", type=int, default=1, help="Minimum tokens to keep for min-p"
    )
    group.add_argument("--seed", type=parse_seed, help="PRNG seed")
    return group


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that bound the memory."""
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
