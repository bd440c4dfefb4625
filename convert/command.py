"""``mlx_ifp.convert`` makes a checkpoint from a dense or trained model or another checkpoint."""

import argparse
import signal
import sys
from pathlib import Path

from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.tokenizers import load_tokenizer_of

from .conversion import convert


def convert_with(args: argparse.Namespace) -> Path:
    """Run :func:`convert` as the command line says."""
    options = dict(vars(args))
    options["quantize_weights"] = options.pop("quantize")
    options["dequantize_weights"] = options.pop("dequantize")
    return convert(**options)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.convert``."""
    # When the process is told to terminate, it should clean up as it does after Ctrl-C.
    signal.signal(signal.SIGTERM, _terminated)
    path = convert_with(args)
    if args.dry_run:
        return
    checkpoint, options = open_checkpoint(path), {"trust_remote_code": args.trust_remote_code}
    channels = sum(tensor.nbytes for tensor in checkpoint.channels.values())
    trunk = sum(tensor.nbytes for tensor in checkpoint.trunk.values())
    predictor = sum(t.nbytes for t in (checkpoint.predictor | checkpoint.head).values())
    print(
        f"{path}: {checkpoint.config['model_type']}, {len(checkpoint.ffns)} layers of "
        f"{checkpoint.d_ffn} channels, k = {checkpoint.ifp.k}; "
        f"trunk {trunk / 1e6:.1f} MB, channels {channels / 1e6:.1f} MB"
        + (f", predictor {predictor / 1e6:.1f} MB" if predictor else "")
    )
    if not checkpoint.head and load_tokenizer_of(checkpoint, options).has_chat_template:
        advice = f"mlx_ifp.fit --model {path} --mlx-path {path}-fitted"
        print(f"[INFO] A fitted predictor selects better channels: {advice}", file=sys.stderr)
