"""How fast and in how much memory a checkpoint is converted, against ``cp`` of the same files.

Run with ``python -m mlx_ifp.convert.benchmark``. The checkpoint is made up on the spot, of the
layout "module" with a Llama and a Qwen2 backbone, and removed afterwards.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mlx_ifp.checkpoint.expected import parameters_of
from mlx_ifp.cli.dispatch import script
from mlx_ifp.files.tensor_files import LazyTensor, spent, write_safetensors
from mlx_ifp.llm.build import build_model

from .command import convert_with
from .options import setup_arg_parser as setup_arg_parser_of_convert

_LLM: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
_BACKBONE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_P = 128
# These add up to the time of a conversion, but for hashing, which goes on beside them.
_PARTS = ("making", "writing", "waiting", "rest", "hashing")


def make_checkpoint(directory: Path, gigabytes: float, suffix: str) -> tuple[Path, list[str]]:
    """Write a bfloat16 checkpoint of the layout "module" that has about this many gigabytes.

    Returns:
        tuple: the file, and the flags that name what the checkpoint lacks.
    """
    layers = 1
    while _size(layers) < gigabytes * 1e9:
        layers += 1
    llm = _LLM | {"num_hidden_layers": layers}
    prefixes = {"llm.": llm, "sparsity_predictor.feature_extractor.": _BACKBONE}
    shapes = {
        f"{prefix}{name}": array.shape
        for prefix, config in prefixes.items()
        for name, array in parameters_of(build_model(config))
    }
    scores = layers * llm["intermediate_size"]
    for i, shape in enumerate(((_P, _BACKBONE["hidden_size"]), (scores, _P)), 1):
        shapes[f"sparsity_predictor.prediction_head{i}.weight"] = shape
        shapes[f"sparsity_predictor.prediction_head{i}.bias"] = shape[:1]
    path = directory / f"model{suffix}"
    _write(path, shapes)
    for name, config in (("llm", llm), ("backbone", _BACKBONE)):
        (directory / f"{name}.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory / "tokenizer")
    flags = ["--llm-config", "llm.json", "--predictor-config", "backbone.json"]
    flags += ["--tokenizer", "tokenizer", "--predictor-tokenizer", "tokenizer", "--keep", "4096"]
    return path, [str(directory / f) if not f.startswith(("-", "4")) else f for f in flags]


def _size(layers: int) -> int:
    hidden, ffn = _LLM["hidden_size"], _LLM["intermediate_size"]
    per_layer = 2.5 * hidden * hidden + 3 * hidden * ffn + _P * ffn
    return int(2 * (layers * per_layer + 2 * _LLM["vocab_size"] * hidden)) + 400_000_000


def _write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write tensors that repeat one random pattern: any values will do, if they are not zero."""
    pattern = np.random.default_rng(0).integers(0x3A00, 0x3C00, 1 << 20, dtype=np.uint16)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(pattern, shape)

    if path.suffix == ".safetensors":

        def lazy_of(shape: tuple[int, ...]) -> LazyTensor:
            return LazyTensor(tuple(shape), mx.bfloat16, lambda *_: values(shape))

        lazy = {name: lazy_of(shape) for name, shape in shapes.items()}
        write_safetensors(path, lazy)
        return
    import torch

    state = {name: torch.from_numpy(values(s)).view(torch.bfloat16) for name, s in shapes.items()}
    torch.save(state, path)


def timed(work: Callable[[], object], leftovers: Path) -> float:
    """Measure the seconds that a piece of work takes.

    The files that earlier work has left are removed just before, so that every run finds the same
    pages of memory free: a virtual machine gives free pages back to its host within seconds, and
    getting them again is slow.
    """
    os.sync()
    if leftovers.is_dir():
        shutil.rmtree(leftovers)
    else:
        leftovers.unlink(missing_ok=True)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def convert_timed(
    args: list[str], out: Path, leftovers: Path
) -> tuple[float, int, str, dict[str, float]]:
    """Convert in this process.

    Returns:
        tuple: seconds, peak memory in bytes, what was printed, and the seconds of each part.
    """
    options = setup_arg_parser_of_convert().parse_args([*args, "--mlx-path", str(out)])
    text = io.StringIO()
    before = asdict(spent)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
        seconds = timed(lambda: convert_with(options), leftovers)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = {name: value - before[name] for name, value in asdict(spent).items()}
    # Hashing goes on beside the others.
    parts["rest"] = seconds - parts["making"] - parts["writing"] - parts["waiting"]
    # Linux counts in KB, and macOS counts in bytes.
    peak = usage * (1 if platform.system() == "Darwin" else 1024)
    return seconds, peak, text.getvalue(), parts


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_ifp.convert.benchmark",
        description="Time and memory of a conversion, against cp of the same files.",
    )
    parser.add_argument("--size", type=float, default=3.0, help="GB of the checkpoint")
    parser.add_argument(
        "--suffix", default=".safetensors", choices=[".safetensors", ".pt"], help="Its file"
    )
    parser.add_argument("-n", "--num-trials", type=int, default=3, help="Times each is run")
    parser.add_argument("--convert-args", default="", help="More flags for mlx_ifp.convert")
    return parser


@script
def main() -> None:
    """Run the benchmark."""
    args = setup_arg_parser().parse_args()
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mlx_ifp-") as name:
        directory = Path(name)
        with spawn.Pool(1) as pool:
            path, flags = pool.apply(make_checkpoint, (directory, args.size, args.suffix))
            _end(pool)
        size = path.stat().st_size
        copy, out = directory / "copy", directory / "out"
        flags = ["--model", str(path), *flags, *args.convert_args.split()]
        copies, conversions, splits = [], [], []
        # This process has imported all that it needs, and has done nothing else.
        with spawn.Pool(1) as pool:
            _, _, plan, _ = pool.apply(convert_timed, ([*flags, "--dry-run"], out, out))
            shutil.copyfile(path, copy)
            for _ in range(args.num_trials):
                cp = ["cp", str(path), str(copy)]
                copies.append(timed(partial(subprocess.run, cp, check=True), copy))
                seconds, peak, _, split = pool.apply(convert_timed, (flags, out, copy))
                conversions.append(seconds)
                splits.append(split)
                shutil.copyfile(path, copy)
                shutil.rmtree(out)
            _end(pool)
    ratios = [cp / own for cp, own in zip(copies, conversions, strict=True)]
    largest = 2 * _LLM["vocab_size"] * _LLM["hidden_size"]
    said = re.search(r"memory: +up to ([\d,]+)", plan)
    estimate = said[1] if said else "?"
    print(f"{size / 1e9:.2f} GB, {args.suffix}, median of {args.num_trials} (min-max)")
    print(f"cp, s            {_spread(copies)}")
    print(f"convert, s       {_spread(conversions)}")
    for part in _PARTS:
        print(f"  {part:14} {_spread([split[part] for split in splits])}")
    print(f"cp / convert     {_spread(ratios)}")
    print(f"peak memory      {peak / 1e6:.0f} MB, the dry run says {estimate} MB at most")
    print(f"largest tensor   {largest / 1e6:.0f} MB")


def _end(pool: Pool) -> None:
    """Let the process end by itself: Python reports a leak if it is ended from outside."""
    pool.close()
    pool.join()


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
