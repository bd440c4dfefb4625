"""``mlx_ifp.convert``: a dense model becomes a checkpoint."""

import argparse
import json
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_ifp.activations import activation_scores
from mlx_ifp.atomic import new_directory
from mlx_ifp.channels import ChannelReader
from mlx_ifp.checkpoint import (
    STATIC_FILE,
    load_trunk,
    open_checkpoint,
    write_checkpoint,
)
from mlx_ifp.cli import command
from mlx_ifp.config import CONFIG_FILE, IFPConfig, TextConfig
from mlx_ifp.errors import IFPError
from mlx_ifp.model import Keep, default_dtype, resolve_keep
from mlx_ifp.options import parse_keep
from mlx_ifp.tensor_files import write_safetensors
from mlx_ifp.text import selector_tokens

from .dense import (
    DTYPES,
    channel_major,
    dequantize,
    load_dense,
    quantize,
    save_beside,
    set_dtype,
    take_tensors,
)

DEFAULT_KEEP = 0.5
MAX_TEXT_TOKENS = 8192
# Tokenizer, configs and the file system's own needs.
SPARE_BYTES = 64 << 20


def convert(
    model: str,
    mlx_path: str | Path = "mlx_model",
    *,
    keep: Keep = DEFAULT_KEEP,
    quantize_weights: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    dequantize_weights: bool = False,
    dtype: str | None = None,
    tokenizer: str | None = None,
    text_format: str | None = None,
    static_prompts: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Make a checkpoint from a dense model. Tensors stream through memory one at a time.

    Args:
        model (str): a directory, a hub id, or a GGUF file of the llama architecture.
        mlx_path: the checkpoint to make; it must not exist.
        keep: k, a count, a fraction (float) or a list of L counts.
        quantize_weights, q_bits, q_group_size, q_mode, dequantize_weights, dtype: as in
            ``mlx_lm.convert``.
        tokenizer (str): where to take the tokenizer from, if not from the model.
        text_format (str): how the text that selects is tokenized, ``raw`` or ``chat_template``;
            by default the latter if the tokenizer has one.
        static_prompts: a text or jsonl file of prompts; their mean ``activations`` scores become
            the scores of the ``static`` selector.
        revision (str): of a hub repository.
        trust_remote_code (bool): let the tokenizer run code of its repository.

    Returns:
        Path: the checkpoint.

    Raises:
        IFPError: one line; nothing is left behind.
    """
    mlx_path = Path(mlx_path)
    prompts = _read_prompts(Path(static_prompts)) if static_prompts is not None else None
    with new_directory(mlx_path) as directory:
        dense = load_dense(
            model, revision=revision, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
        k = resolve_keep(keep, dense.ffns[0].d_ffn, len(dense.ffns))
        if dequantize_weights:
            dequantize(dense)
        set_dtype(dense, dtype)
        channel_major(dense)
        if quantize_weights:
            quantize(dense, bits=q_bits, group_size=q_group_size, mode=q_mode)
        trunk, channels = take_tensors(dense)
        needed = sum(array.nbytes for array in (trunk | channels).values())
        _check_space(mlx_path, needed)
        context = dense.config.get("max_position_embeddings") or MAX_TEXT_TOKENS
        if text_format is None:
            text_format = "chat_template" if dense.tokenizer.has_chat_template else "raw"
        ifp = IFPConfig(
            k=k,
            text=TextConfig(format=text_format, max_tokens=min(context, MAX_TEXT_TOKENS)),
            source=dense.source | {"mlx_ifp": version("mlx_ifp"), "mlx_lm": version("mlx_lm")},
        )
        with tqdm(total=needed, unit="B", unit_scale=True, desc="Converting") as bar:
            write_checkpoint(
                directory, dense.config, ifp, {"model": trunk, "channels": channels}, bar.update
            )
        save_beside(dense, directory)
        if prompts is not None:
            _add_static_scores(directory, ifp, dense.tokenizer, prompts)
        open_checkpoint(directory)
    for note in dense.notes:
        print(f"[INFO] {note}", file=sys.stderr)
    return mlx_path


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed + SPARE_BYTES:
        raise IFPError(
            f"{path} needs {(needed + SPARE_BYTES) / 1e6:,.0f} MB, but its disk has only "
            f"{free / 1e6:,.0f} MB free. Free some space or name another --mlx-path."
        )


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line; in a .jsonl file the first user message, or ``prompt`` or ``text``."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise IFPError(f"{path} is not a text file.") from error
    prompts = lines
    if path.suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                messages = record.get("messages", [])
                users = [m["content"] for m in messages if m["role"] == "user"]
                prompts.append((users or [record.get("prompt") or record["text"]])[0])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise IFPError(f"{path}, line {number}: no messages, prompt or text.") from error
    if not prompts:
        raise IFPError(f"{path} has no prompts.")
    return prompts


def _add_static_scores(
    directory: Path, ifp: IFPConfig, tokenizer: TokenizerWrapper, prompts: list[str]
) -> None:
    """The mean over prompts of each one's activation scores, at unit norm in every layer."""
    checkpoint = open_checkpoint(directory)
    dtype = default_dtype()
    trunk = load_trunk(checkpoint, checkpoint.d_ffn, dtype)
    reader = ChannelReader(checkpoint.channels)
    total = mx.zeros((len(checkpoint.ffns), checkpoint.d_ffn))
    for prompt in tqdm(prompts, desc="Static scores"):
        tokens = selector_tokens(tokenizer, prompt, ifp.text)
        scores = activation_scores(
            trunk, reader, checkpoint.ffns, checkpoint.config, tokens, dtype=dtype
        )
        total = total + scores / mx.linalg.norm(scores, axis=-1, keepdims=True)
        mx.eval(total)
    ifp.files[STATIC_FILE] = write_safetensors(
        directory / STATIC_FILE, {"scores": total / len(prompts)}
    )
    (directory / CONFIG_FILE).write_text(ifp.to_json())


EXAMPLES = """examples:
  mlx_ifp.convert --model mlx-community/Llama-3.2-3B-Instruct-bf16 --mlx-path llama-ifp
  mlx_ifp.convert --model Qwen/Qwen3-8B --mlx-path qwen-ifp --keep 0.33 -q --q-bits 4
  mlx_ifp.convert --model SmolLM2-135M-Instruct.Q4_1.gguf --mlx-path smollm2-ifp --keep 768
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.convert``: mlx-lm's where they mean the same, and ours."""
    parser = argparse.ArgumentParser(
        prog="mlx_ifp.convert",
        description="Make a checkpoint from a dense model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", "--hf-path", required=True, help="A directory, a hub id, or a .gguf file"
    )
    parser.add_argument("--mlx-path", default="mlx_model", help="The checkpoint to make")
    parser.add_argument("--revision", help="Revision of the hub repository")
    parser.add_argument(
        "--keep",
        type=parse_keep,
        default=DEFAULT_KEEP,
        metavar="K|FRACTION",
        help=f"FFN channels to keep in each layer (default: {DEFAULT_KEEP})",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("-q", "--quantize", action="store_true", help="Quantize the weights")
    precision.add_argument(
        "-d", "--dequantize", action="store_true", help="Dequantize a quantized model"
    )
    parser.add_argument("--q-bits", type=int, help="Bits per weight")
    parser.add_argument("--q-group-size", type=int, help="Group size")
    parser.add_argument(
        "--q-mode",
        default="affine",
        choices=["affine", "mxfp4", "nvfp4", "mxfp8"],
        help="Quantization mode (default: affine)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="Type of what is not quantized (default: as the model's)"
    )
    parser.add_argument("--tokenizer", help="Take the tokenizer from here")
    parser.add_argument(
        "--text-format",
        choices=["raw", "chat_template"],
        help="How the text that selects is tokenized (default: chat_template if there is one)",
    )
    parser.add_argument(
        "--static-prompts",
        metavar="FILE",
        help="Prompts, one a line or jsonl, whose mean scores the 'static' selector uses",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run code of the model's repository",
    )
    return parser


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


@command
def main() -> None:
    """Run ``mlx_ifp.convert``."""
    args = setup_arg_parser().parse_args()
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_mode != "affine"):
        raise IFPError("--q-bits, --q-group-size and --q-mode need -q.")
    # A kill should clean up like Ctrl-C.
    signal.signal(signal.SIGTERM, _terminated)
    path = convert(
        args.model,
        args.mlx_path,
        keep=args.keep,
        quantize_weights=args.quantize,
        q_bits=args.q_bits,
        q_group_size=args.q_group_size,
        q_mode=args.q_mode,
        dequantize_weights=args.dequantize,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        text_format=args.text_format,
        static_prompts=args.static_prompts,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    checkpoint = open_checkpoint(path)
    channels = sum(tensor.nbytes for tensor in checkpoint.channels.values())
    trunk = sum(tensor.nbytes for tensor in checkpoint.trunk.values())
    print(
        f"{path}: {checkpoint.config['model_type']}, {len(checkpoint.ffns)} layers of "
        f"{checkpoint.d_ffn} channels, k = {checkpoint.ifp.k}; "
        f"trunk {trunk / 1e6:.1f} MB, channels {channels / 1e6:.1f} MB"
    )
