"""Store the embedding and the down projections of a checkpoint in fewer bits, and add a predictor.

    python examples/default_model/round_weights.py smollm2-native smollm2-fitted OUT \\
        --data my-rows.jsonl --bits 5

Each weight is rounded by GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", 2022, arXiv 2210.17323): inputs are rounded one by one, and
those that follow make up for the error, as far as the inputs of --data go together. All other
tensors stay as they are, bit for bit. ``mlx_ifp.convert`` quantizes all of a model or nothing, and
rounds to the nearest.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

import mlx_ifp
from mlx_ifp.checkpoint.directory import (
    CHANNELS,
    HEAD_STEM,
    TRUNK,
    Checkpoint,
    open_checkpoint,
    write_checkpoint,
)
from mlx_ifp.checkpoint.expected import quantized_modules
from mlx_ifp.checkpoint.precision import Precisions
from mlx_ifp.checkpoint.weights import load_tensors
from mlx_ifp.cli.dispatch import script
from mlx_ifp.convert.requantize import plan_requantized
from mlx_ifp.convert.streams import Tensors, dequantized
from mlx_ifp.dense_pass.layers import Piece, run_layers
from mlx_ifp.errors import IFPError
from mlx_ifp.files.atomic import new_directory
from mlx_ifp.files.tensor_files import LazyTensor
from mlx_ifp.fitting.examples import make_examples, read_rows
from mlx_ifp.llm.build import quantization_of

EMBEDDING = "model.embed_tokens"
# A share of the mean is added to the diagonal of the products, so that they can be inverted.
DAMPING = 0.01
TEXTS_AT_ONCE, TEXT_TOKENS, BLOCK = 12, 256, 128


def products_of_inputs(
    checkpoint: str, data: Path, count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """What goes into the down projections and into the output layer, times itself.

    Args:
        checkpoint (str): the model in floats.
        data (Path): rows of training data with answers.
        count (int): how many of them are read.

    Returns:
        tuple: a float32 [d_ffn, d_ffn] for each layer, and one [d, d] for the output layer.
    """
    model, tokenizer = mlx_ifp.load(checkpoint, cache=False)
    rows = [row for row in read_rows(data) if row.answer is not None][:count]
    examples, _ = make_examples(tokenizer, rows, max_answer_tokens=TEXT_TOKENS, max_seq_length=4096)
    texts = sorted((example.tokens[:TEXT_TOKENS] for example in examples), key=len)
    pieces, counts = [], []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = texts[start : start + TEXTS_AT_ONCE]
        tokens = np.zeros((len(batch), len(batch[-1])), np.int32)
        counted = np.zeros((*tokens.shape, 1), np.float32)
        for row, text in enumerate(batch):
            tokens[row, : len(text)] = text
            counted[row, : len(text)] = 1
        pieces.append(Piece(mx.array(tokens)))
        counts.append(mx.array(counted))

    def products(piece: int, z: mx.array, _: nn.Module | None = None) -> mx.array:
        flat = (z.astype(mx.float32) * counts[piece]).reshape(-1, z.shape[-1])
        return flat.T @ flat

    result = run_layers(model.parent, pieces, products)
    hidden = sum(np.array(products(i, states)) for i, states in enumerate(result.hidden))
    return [sum(np.array(each) for each in layer) for layer in result.measured], hidden


def inverse_factor(products: np.ndarray) -> np.ndarray:
    """The upper triangular U with U^T U = (products + damping)^-1, float32."""
    damped = products.astype(np.float64)
    damped[np.diag_indices(len(damped))] += DAMPING * np.diag(damped).mean()
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def scales_of(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of groups [..., n], from the least value to the largest, as float16 has them.

    To cut off the ends of the range made the embedding worse, and the down projections no better.
    """
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    scale = np.where(scale == 0, np.float32(6e-8), scale)
    return scale, low.astype(np.float16).astype(np.float32)


def round_rows(weight: np.ndarray, products: np.ndarray, bits: int, group: int) -> list[np.ndarray]:
    """Round a matrix whose rows are inputs; groups lie inside a row.

    Args:
        weight (np.ndarray): float32 [inputs, outputs].
        products (np.ndarray): [inputs, inputs].

    Returns:
        list: codes [inputs, outputs], scales and biases [inputs, outputs / group].
    """
    # Inputs that matter most are first, while all others can still make up for their errors.
    order = np.argsort(-np.diag(products))
    left, factor = weight[order].copy(), inverse_factor(products[np.ix_(order, order)])
    shape, top = (len(left), left.shape[1] // group), 2**bits - 1
    codes, scales, biases = np.zeros(left.shape, np.uint8), np.zeros(shape), np.zeros(shape)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.zeros((stop - start, left.shape[1]), np.float32)
        for i in range(start, stop):
            groups = left[i].reshape(-1, group)
            scale, bias = scales_of(groups, bits)
            code = np.clip(np.rint((groups - bias) / scale), 0, top)
            codes[i], scales[i], biases[i] = code.reshape(-1), scale[:, 0], bias[:, 0]
            error = (left[i] - (code * scale + bias).reshape(-1)) / factor[i, i]
            left[i + 1 : stop] -= factor[i, i + 1 : stop, None] * error
            errors[i - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    back = np.argsort(order)
    return [codes[back], scales[back], biases[back]]


def round_columns(
    weight: np.ndarray, products: np.ndarray, bits: int, group: int
) -> list[np.ndarray]:
    """Round a matrix whose columns are inputs; see :func:`round_rows`.

    Args:
        weight (np.ndarray): float32 [outputs, inputs]; groups lie inside a row.
        products (np.ndarray): [inputs, inputs].
    """
    left, factor, top = weight.copy(), inverse_factor(products), 2**bits - 1
    codes, scales, biases = np.zeros(left.shape, np.uint8), [], []
    for start in range(0, left.shape[1], group):
        stop = start + group
        scale, bias = scales_of(left[:, start:stop], bits)
        errors = np.zeros((len(left), group), np.float32)
        for i in range(start, stop):
            code = np.clip(np.rint((left[:, i : i + 1] - bias) / scale), 0, top)
            codes[:, i : i + 1] = code
            error = (left[:, i : i + 1] - (code * scale + bias)) / factor[i, i]
            left[:, i + 1 : stop] -= error * factor[i, i + 1 : stop]
            errors[:, i - start : i - start + 1] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
        scales.append(scale)
        biases.append(bias)
    return [codes, np.concatenate(scales, axis=1), np.concatenate(biases, axis=1)]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, n] as MLX packs them: uint32 [rows, n * bits / 32], lowest bits first."""
    parts = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(parts.reshape(len(codes), -1), axis=-1, bitorder="little").view(np.uint32)


def replace_module(
    tensors: Tensors, module: str, config: dict, how: dict, parts: list[np.ndarray]
) -> None:
    """Put a rounded module in the place of one, and say so in the config."""
    codes, scales, biases = parts
    arrays = {
        "weight": mx.array(packed(codes, how["bits"])),
        "scales": mx.array(scales.astype(np.float16)),
        "biases": mx.array(biases.astype(np.float16)),
    }
    for name, array in arrays.items():
        tensors[f"{module}.{name}"] = LazyTensor.of(array)
    for name in ("quantization", "quantization_config"):
        if name in config:
            config[name][module] = how


def floats_of(tensors: Tensors, module: str, config: dict) -> np.ndarray:
    """The weight of a quantized module; its tensors are taken out."""
    parts = {part: tensors.pop(f"{module}.{part}") for part in ("weight", "scales", "biases")}
    weight = dequantized(parts, quantization_of(config, module))
    return np.concatenate([np.array(block.astype(mx.float32)) for block in weight.blocks()])


def check(checkpoint: Checkpoint, fitted: Checkpoint, modules: list[str]) -> None:
    """Raises IFPError if these are not two forms of one model, as the script takes them."""
    if not fitted.fitted:
        raise IFPError(f"{fitted.path} has no predictor of mlx_ifp.fit.")
    if checkpoint.ffns != fitted.ffns or checkpoint.head or quantized_modules(fitted.channels):
        raise IFPError(f"{checkpoint.path} and {fitted.path} are not the same model without and "
                       "with a predictor, the second one in floats.")  # fmt: skip
    stored = checkpoint.trunk | checkpoint.channels
    for module in (EMBEDDING, *modules):
        if f"{module}.biases" not in stored:
            raise IFPError(f"{checkpoint.path}: {module} must be quantized, in the mode affine.")


@script
def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="quantized")
    parser.add_argument("fitted", type=Path, help="the same model in floats, from mlx_ifp.fit")
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="rows of training data")
    parser.add_argument("--rows", type=int, default=200, help="of the data that are read")
    parser.add_argument("--bits", type=int, default=5)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--keep", type=int, help="k (default: the checkpoint's)")
    args = parser.parse_args()
    how = {"group_size": args.group_size, "bits": args.bits, "mode": "affine"}
    size = args.bits, args.group_size
    checkpoint, fitted = open_checkpoint(args.checkpoint), open_checkpoint(args.fitted)
    modules = [ffn.module_path("down_proj") for ffn in checkpoint.ffns]
    check(checkpoint, fitted, modules)
    # What is wrong with the output is found out before minutes are spent.
    with new_directory(args.output) as directory:
        of_layers, of_output = products_of_inputs(str(args.fitted), args.data, args.rows)
        plan = plan_requantized(args.checkpoint, args.keep, Precisions())
        trunk, channels, config = plan.tensors[TRUNK], plan.tensors[CHANNELS], plan.config
        rounded = round_columns(floats_of(trunk, EMBEDDING, config), of_output, *size)
        replace_module(trunk, EMBEDDING, config, how, rounded)
        for module, products in zip(tqdm(modules), of_layers, strict=True):
            rounded = round_rows(floats_of(channels, module, config), products, *size)
            replace_module(channels, module, config, how, rounded)
        head = load_tensors(fitted.head, None)
        plan.tensors[HEAD_STEM] = {name: LazyTensor.of(array) for name, array in head.items()}
        # What selects is taken from the fitted checkpoint, and all else from the quantized one.
        source = plan.ifp.source | {"fit": fitted.ifp.source["fit"]}
        ifp = replace(fitted.ifp, k=plan.ifp.k, files={}, source=source)
        for file in plan.extra_files:
            shutil.copy(file, directory)
        write_checkpoint(directory, config, ifp, plan.tensors)


if __name__ == "__main__":
    main()
