"""The precision of a checkpoint: its types, which modules are quantized, and how."""

import contextlib
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

from ..errors import IFPError, one_line
from ..llm.build import build_model
from ..llm.ffn import FFN
from ..llm.modules import get_module, linear
from .expected import HEAD_MODULE

# This is mlx-lm's default for the mode affine.
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class Precision:
    """How to store a model; the fields are the options of ``mlx_lm.convert``.

    Attributes:
        dtype: the type of what is not quantized; None keeps it.
        quantize: whether to quantize.
        bits, group_size: None takes mlx-lm's default of the mode.
        mode: affine, mxfp4, nvfp4 or mxfp8.
        recipe: one of mlx-lm's mixed recipes, or None.
    """

    dtype: str | None = None
    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None

    def check(self) -> None:
        """Raises IFPError if the options contradict one another."""
        if self.recipe is not None and self.mode != "affine":
            raise IFPError("--quant-predicate needs --q-mode affine.")
        if any(n is not None and n < 1 for n in (self.bits, self.group_size)):
            raise IFPError("Bits and group sizes are numbers above 0.")
        given = self.bits or self.group_size or self.mode != "affine" or self.recipe
        if given and not self.quantize:
            raise IFPError("--q-bits, --q-group-size, --q-mode and --quant-predicate need -q.")


@dataclass(frozen=True)
class Precisions:
    """How to store the parts of a checkpoint: the LLM, the predictor's backbone and its head."""

    llm: Precision = Precision()
    predictor: Precision = Precision()
    head: Precision = Precision()

    @classmethod
    def of(
        cls,
        llm: Precision,
        predictor_dtype: str | None = None,
        predictor_bits: int | None = None,
        predictor_group_size: int | None = None,
        head_bits: int | None = None,
    ) -> "Precisions":
        """Take the LLM's precision for all parts, but for what the other arguments change.

        Args:
            llm: the LLM's precision.
            predictor_dtype, predictor_bits, predictor_group_size: those of the backbone; 0 bits
                leave it unquantized.
            head_bits: the bits of the head, which has the backbone's groups; None leaves it
                unquantized.

        Raises:
            IFPError: if the options contradict one another.
        """
        llm.check()
        predictor = precision_of_predictor(
            llm, predictor_dtype, predictor_bits, predictor_group_size, head_bits
        )
        predictor.check()
        head = precision_of_head(predictor, head_bits, predictor_group_size or llm.group_size)
        return cls(llm, predictor, head)


def quantize_config(
    config: dict[str, Any], ffns: list[FFN], precision: Precision
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Find which modules mlx-lm would quantize, and how; no weight is touched.

    Down projections are judged by the shape in which they are stored: a channel is a row.

    Args:
        config (dict): the config of mlx-lm's model.
        ffns (list): its FFNs; empty for a predictor's backbone, which stays as mlx-lm has it.
        precision (Precision): how to quantize; nothing is quantized without ``quantize``.

    Returns:
        tuple: the config with ``quantization``; module path -> group_size, bits and mode; and
        what the user should know.
    """
    if not precision.quantize:
        return config, {}, []
    if "quantization" in config:
        raise IFPError("The model is quantized already; leave out -q, or convert the original.")
    network = build_model(config)
    for ffn in ffns:
        module = get_module(network, ffn.path)
        module.down_proj = linear(module.down_proj.weight.T, module.down_proj.get("bias"))
    group_size = precision.group_size
    predicate: Callable[..., bool | dict[str, Any]] | None = None
    if precision.recipe is not None:
        group_size = group_size or DEFAULT_GROUP_SIZE
        predicate = mixed_quant_predicate_builder(precision.recipe, network, group_size)
    # mlx-lm prints a summary, which goes to stderr because stdout is for results.
    with one_line("The model cannot be quantized so"), contextlib.redirect_stdout(sys.stderr):
        network, config = quantize_model(
            network,
            copy.deepcopy(config),
            group_size,
            precision.bits,
            mode=precision.mode,
            quant_predicate=predicate,
        )
    plan = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in network.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }
    left = [ffn for ffn in ffns if ffn.module_path("down_proj") not in plan]
    notes = []
    if left:
        notes.append(
            f"The FFN of {len(left)} layers stays unquantized: the hidden size "
            f"{left[0].hidden_size} is no multiple of the group size."
        )
    return config, plan, notes


def quantize_head(
    config: dict[str, Any], widths: list[int], precision: Precision
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Find the same for a predictor's head.

    A Linear whose input is no multiple of the group size is not quantized.

    Args:
        config (dict): the backbone's config.
        widths (list): the widths of the head's Linears.
        precision (Precision): how to quantize, in the mode affine; nothing is quantized without
            ``quantize``.
    """
    how: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    if not precision.quantize:
        return config, how, notes
    precision.check()
    group_size = precision.group_size or DEFAULT_GROUP_SIZE
    one: dict[str, Any] = {"group_size": group_size, "bits": precision.bits, "mode": "affine"}
    for i, width in enumerate(widths[:-1], 1):
        if width % group_size:
            notes.append(
                f"linear{i} of the predictor's head stays unquantized: its input {width} is no "
                f"multiple of the group size {group_size}."
            )
            continue
        with one_line("The predictor's head cannot be quantized so"):
            mx.quantize(mx.zeros((1, width)), **one)
        how[f"linear{i}"] = one
    return name_head_modules(config, how), how, notes


def name_head_modules(config: dict[str, Any], how: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add the quantization of the head's Linears to the backbone's config, by name."""
    if not how:
        return config
    modules = {f"{HEAD_MODULE}.{name}": dict(one) for name, one in how.items()}
    return config | {
        "quantization": next(iter(how.values())) | config.get("quantization", {}) | modules
    }


def precision_of_predictor(
    precision: Precision,
    dtype: str | None,
    bits: int | None,
    group_size: int | None,
    head_bits: int | None,
) -> Precision:
    """Take the LLM's precision, but for what is given."""
    own = replace(precision, dtype=dtype or precision.dtype)
    if bits == 0:
        return Precision(dtype=own.dtype)
    if bits is not None:
        own = replace(own, quantize=True, bits=bits, mode="affine", recipe=None)
    elif group_size is not None and not own.quantize:
        if not head_bits:
            raise IFPError(
                "--predictor-q-group-size needs --predictor-q-bits, --head-q-bits or -q."
            )
        return own
    return replace(own, group_size=group_size or own.group_size)


def precision_of_head(predictor: Precision, bits: int | None, group_size: int | None) -> Precision:
    """Leave a head unquantized unless bits are given; then its mode is affine, the only one."""
    if not bits:
        return Precision(dtype=predictor.dtype)
    return Precision(predictor.dtype, True, bits, group_size or DEFAULT_GROUP_SIZE)
