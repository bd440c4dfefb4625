"""The command line of ``mlx_ifp.server``."""

import argparse
import os

from ...cli.flags import (
    add_kv_options,
    add_model_options,
    add_prefill_option,
    new_parser,
    parse_count,
    parse_number,
    parse_object,
    parse_share,
    parse_size,
)

EXAMPLES = """examples:
  mlx_ifp.server --model qwen3-ifp
  mlx_ifp.server --model qwen3-ifp --port 8000 --memory-limit 6GB --idle-timeout 600
  MLX_IFP_API_KEY=secret mlx_ifp.server --model qwen3-ifp --host 0.0.0.0
  curl http://127.0.0.1:8080/v1/models
"""


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


def _seconds(text: str) -> float:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.server``: mlx-lm's where they mean the same, and ours."""
    parser = new_parser(
        "server",
        "Serve a checkpoint and its tasks over HTTP, as OpenAI's and Anthropic's services answer.",
        EXAMPLES,
    )
    add_model_options(parser)
    _add_address(parser)
    _add_defaults(parser)
    add_kv_options(parser)
    bounds = parser.add_argument_group("memory and load")
    bounds.add_argument(
        "--decode-concurrency",
        type=parse_count,
        default=32,
        help="Answers that are generated at once (default: 32)",
    )
    bounds.add_argument(
        "--prompt-concurrency",
        type=parse_count,
        default=8,
        help="Prompts that are read at once (default: 8)",
    )
    bounds.add_argument(
        "--prompt-cache-size",
        type=parse_count,
        default=10,
        help="Conversations whose keys and values are kept (default: 10)",
    )
    bounds.add_argument(
        "--prompt-cache-bytes",
        type=parse_size,
        metavar="SIZE",
        help="Bytes that kept keys and values may take, such as 2GB",
    )
    bounds.add_argument(
        "--warm-system-prompt",
        action="store_true",
        help="Keep the keys and values of system prompts on disk, for the next start",
    )
    bounds.add_argument(
        "--max-queue",
        type=parse_number,
        default=128,
        metavar="N",
        help="Requests that may wait; one more is answered with 429 (default: 128)",
    )
    bounds.add_argument(
        "--memory-limit",
        type=parse_size,
        metavar="SIZE",
        help="Bytes that trunk, predictor, sub-networks, keys and values may take together, such "
        "as 6GB or 800MB (a GB is 10^9 bytes). A request that does not fit now waits, and one "
        "that never fits is refused",
    )
    bounds.add_argument(
        "--idle-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="Without a request for so long, free sub-networks, keys and values, and the "
        "predictor; the next request loads what it needs",
    )
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("address and access")
    group.add_argument(
        "--host", default="127.0.0.1", help="The address to bind (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=_port, default=8080, help="The port (default: 8080)")
    group.add_argument(
        "--model-name", metavar="NAME", help="The model's id (default: the checkpoint's name)"
    )
    group.add_argument(
        "--api-key",
        default=os.environ.get("MLX_IFP_API_KEY"),
        metavar="KEY",
        help="Requests must have this key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY' "
        "(default: $MLX_IFP_API_KEY, which other users of this machine cannot see)",
    )
    group.add_argument(
        "--no-auth",
        action="store_true",
        help="Let everybody in who reaches an address that is not loopback",
    )
    group.add_argument(
        "--allowed-origins",
        type=lambda text: [origin.strip() for origin in text.split(",") if origin.strip()],
        metavar="ORIGIN,...",
        help="Origins of web pages that may ask, or * (default: those of this machine)",
    )
    group.add_argument(
        "--log-level",
        default="INFO",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        help="What is logged to stderr (default: INFO)",
    )


def _add_defaults(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("defaults of requests")
    add_prefill_option(group)
    group.add_argument("--temp", type=_not_negative, default=0.0, help="Sampling temperature")
    group.add_argument("--top-p", type=parse_share, default=1.0, help="Sampling top-p")
    group.add_argument("--top-k", type=parse_number, default=0, help="Sampling top-k")
    group.add_argument("--min-p", type=parse_share, default=0.0, help="Sampling min-p")
    group.add_argument(
        "--max-tokens", type=parse_count, default=512, help="Tokens to generate (default: 512)"
    )
    group.add_argument(
        "--chat-template-args",
        type=parse_object,
        default={},
        metavar="JSON",
        help="""Arguments for the chat template, such as '{"enable_thinking": false}'""",
    )
