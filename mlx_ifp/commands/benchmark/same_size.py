"""What a sub-network is compared with: the same network as mlx-lm itself would have it."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...llm.ffn import FFN
from ...llm.modules import get_module, linear, share
from ...subnetwork.build import ChannelMajorLinear


def same_size_model(network: nn.Module, ffns: list[FFN]) -> tuple[nn.Module, list[str]]:
    """A sub-network as mlx-lm would have it, had it been trained and saved at that size.

    All arrays are the sub-network's own but down_proj, which gets the usual layout [hidden, k]:
    the same function for float weights; else the same up to quantizing along k.

    Args:
        network (nn.Module): a sub-network.
        ffns (list): the checkpoint's FFNs.

    Returns:
        tuple: the model, made of mlx's own layers only, and notes on what could not be alike.
    """
    model = share(network)
    notes = set()
    for ffn in ffns:
        module = get_module(model, ffn.path)
        down = module.down_proj
        if isinstance(down, ChannelMajorLinear):
            how = {"group_size": down.group_size, "bits": down.bits, "mode": down.mode}
            rows = mx.dequantize(down.weight, down.scales, down.get("biases"), **how)
            if "soft_values" in down:
                rows = rows * down.soft_values[:, None]
            weight = mx.contiguous(rows.T).astype(float_dtype(network))
            module.down_proj = linear(weight, down.get("bias"))
            if weight.shape[1] % down.group_size == 0:
                module.down_proj = module.down_proj.to_quantized(**how)
            else:
                notes.add(
                    f"dense, same size: down_proj is not quantized, as k = {weight.shape[1]} is no "
                    f"multiple of the group size {down.group_size}"
                )
        else:
            module.down_proj = linear(mx.contiguous(down.weight), down.get("bias"))
        mx.eval(module.down_proj.parameters())
    return model, sorted(notes)


def arrays_of(module: nn.Module) -> list[mx.array]:
    """All weights of a module."""
    named = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    return [array for _, array in named]


def float_dtype(network: nn.Module) -> mx.Dtype:
    """What a network computes in."""
    return next(
        array.dtype for array in arrays_of(network) if mx.issubdtype(array.dtype, mx.floating)
    )


def memory_of(network: nn.Module) -> dict[str, int]:
    """Bytes of a network's weights, and of those that decoding reads for each token.

    They differ where an embedding has an output layer beside it: one row of the embedding is read.
    """

    def nbytes(module: nn.Module) -> int:
        return sum(array.nbytes for array in arrays_of(module))

    total, looked_up = nbytes(network), 0
    if any(path.split(".")[-1] == "lm_head" for path, _ in network.named_modules()):
        embeddings = (nn.Embedding, nn.QuantizedEmbedding)
        looked_up = sum(nbytes(m) for m in network.modules() if isinstance(m, embeddings))
    return {"weights_bytes": total, "bytes_per_token": total - looked_up}
