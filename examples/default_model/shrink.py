"""Store the embedding and the down projections of a quantized checkpoint in fewer bits.

    python examples/default_model/shrink.py native smaller --bits 6 --group-size 64

All other tensors stay as they are, bit for bit. ``mlx_ifp.convert`` quantizes all of a model or
nothing, and stores the down projections of a GGUF file in 8 bits and its embedding as it is there.
"""

import argparse
import shutil
from pathlib import Path

from mlx_ifp.checkpoint.directory import CHANNELS, TRUNK, open_checkpoint, write_checkpoint
from mlx_ifp.checkpoint.precision import Precisions
from mlx_ifp.convert.requantize import plan_requantized
from mlx_ifp.convert.streams import Tensors, dequantized, quantized
from mlx_ifp.files.atomic import new_directory
from mlx_ifp.llm.build import quantization_of


def requantize(tensors: Tensors, module: str, config: dict, how: dict) -> None:
    """Replace a module's tensors by others with ``how``, and say so in the config."""
    parts = {part: tensors.pop(f"{module}.{part}") for part in ("weight", "scales", "biases")}
    floats = dequantized(parts, quantization_of(config, module))
    tensors.update(quantized(f"{module}.weight", floats, how))
    for name in ("quantization", "quantization_config"):
        if name in config:
            config[name][module] = how


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--keep", type=int, help="k (default: the checkpoint's)")
    args = parser.parse_args()
    how = {"group_size": args.group_size, "bits": args.bits, "mode": "affine"}
    checkpoint = open_checkpoint(args.checkpoint)
    plan = plan_requantized(args.checkpoint, args.keep, Precisions())
    requantize(plan.tensors[TRUNK], "model.embed_tokens", plan.config, how)
    for ffn in checkpoint.ffns:
        requantize(plan.tensors[CHANNELS], ffn.module_path("down_proj"), plan.config, how)
    with new_directory(args.output) as directory:
        for file in plan.extra_files:
            shutil.copy(file, directory)
        write_checkpoint(directory, plan.config, plan.ifp, plan.tensors, lambda count: None)


if __name__ == "__main__":
    main()
