"""Load all of a checkpoint's tensors but its channels into mlx-lm modules."""

import typing

import mlx.core as mx
import mlx.nn as nn

from ..files.tensor_files import TensorInfo, cast
from ..llm.build import build_model, with_width
from ..llm.modules import evaluate, find_body, find_embedding, get_module, set_module
from .directory import Checkpoint, build_llm
from .expected import quantized_modules


def load_tensors(tensors: dict[str, TensorInfo], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """Make lazy arrays of all the tensors; floats are cast to ``dtype`` if one is given.

    Channels come in their original order, whatever order they are stored in.
    """
    arrays: dict[str, mx.array] = {}
    for path in sorted({tensor.path for tensor in tensors.values()}):
        loaded = typing.cast(dict[str, mx.array], mx.load(str(path)))
        arrays |= {k: v for k, v in loaded.items() if k in tensors}
    for name, array in arrays.items():
        if (places := tensors[name].places) is not None:
            arrays[name] = mx.take(array, mx.array(places), axis=0)
    return {name: cast(array, dtype) for name, array in arrays.items()}


def build_backbone(checkpoint: Checkpoint, trunk: nn.Module | None = None) -> nn.Module:
    """Build the modules of the predictor's backbone; no tensor is read.

    Raises:
        ValueError: if it shares the trunk's embedding and there is no trunk.
    """
    assert checkpoint.predictor_config is not None  # it has a predictor
    model = build_model(checkpoint.predictor_config, quantized_modules(checkpoint.predictor))
    if checkpoint.ifp.predictor_embedding == "llm":
        if trunk is None:
            raise ValueError("The predictor shares the LLM's embedding: the trunk is needed.")
        set_module(model, find_embedding(model), get_module(trunk, find_embedding(trunk)))
    return model


def load_backbone(
    checkpoint: Checkpoint, dtype: mx.Dtype | None, trunk: nn.Module | None = None
) -> nn.Module:
    """Load the predictor's backbone, a stock mlx-lm model; an output layer stays unset.

    Args:
        checkpoint (Checkpoint): one that has a predictor.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
        trunk (nn.Module): from :func:`load_trunk`; needed if ``predictor_embedding`` is ``llm``.
            Its embedding module becomes the backbone's.

    Raises:
        ValueError: if the trunk is needed and missing.
    """
    model = build_backbone(checkpoint, trunk)
    arrays = load_tensors(checkpoint.predictor, dtype)
    model.load_weights(list(arrays.items()), strict=False)
    evaluate(model, prefix=f"{find_body(model)}.")
    return model


def build_trunk(checkpoint: Checkpoint, width: int) -> nn.Module:
    """Build the LLM's modules with ``width`` as ``intermediate_size``; no tensor is read."""
    return build_llm(with_width(checkpoint.config, width), checkpoint.trunk)


def begin_trunk(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """Begin to read the trunk's arrays for :func:`load_trunk`, while this thread goes on."""
    arrays = load_tensors(checkpoint.trunk, dtype)
    mx.async_eval(list(arrays.values()))
    return arrays


def load_trunk(
    checkpoint: Checkpoint,
    width: int,
    dtype: mx.Dtype | None,
    arrays: dict[str, mx.array] | None = None,
) -> nn.Module:
    """Load a stock mlx-lm model with the trunk's arrays; its FFNs must still be set.

    Args:
        checkpoint (Checkpoint): an opened checkpoint.
        width (int): the ``intermediate_size`` that the model reports.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
        arrays (dict): of :func:`begin_trunk`, with this type; None reads them now.
    """
    model = build_trunk(checkpoint, width)
    if arrays is None:
        arrays = load_tensors(checkpoint.trunk, dtype)
    model.load_weights(list(arrays.items()), strict=False)
    mx.eval(list(arrays.values()))
    evaluate(model, leave_out=tuple(ffn.path for ffn in checkpoint.ffns))
    return model
