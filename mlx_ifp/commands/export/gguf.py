"""Write GGUF with mlx-lm's exporter."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx_lm.gguf import convert_to_gguf

from ...errors import IFPError, one_line
from .options import GGUF_FILE

GGUF_MODELS = ("llama", "mixtral", "mistral")  # mlx_lm.fuse --export-gguf takes these


def check_gguf(config: dict[str, Any]) -> None:
    """Refuse models that mlx-lm's exporter would write without an error, but wrongly."""
    problem = None
    scaling = config.get("rope_scaling") or {}
    if config["model_type"] not in GGUF_MODELS:
        problem = f"the architecture {config['model_type']!r}; it has {', '.join(GGUF_MODELS)}"
    elif "quantization" in config:
        problem = "quantized weights; add --dequantize"
    elif (config.get("head_dim") or 0) * config["num_attention_heads"] not in (
        0,
        config["hidden_size"],
    ):
        problem = "heads whose size is not hidden_size / num_attention_heads"
    elif config.get("attention_bias"):
        problem = "biases of the attention"
    elif scaling and scaling.get("type") != "linear":
        problem = f"rope_scaling {scaling}"
    if problem is not None:
        raise IFPError(f"mlx-lm's GGUF exporter does not support {problem}.")


def write_gguf(directory: Path, config: dict[str, Any]) -> list[str]:
    weights: dict[str, mx.array] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        weights |= cast(dict[str, mx.array], mx.load(str(file)))
    # mlx-lm prints the name of a temporary directory, which is of no use to users.
    silent = contextlib.redirect_stdout(io.StringIO())
    with one_line("mlx-lm's GGUF exporter cannot write this model"), silent:
        convert_to_gguf(directory, weights, config, str(directory / GGUF_FILE))
    kind = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
    if kind.get("byte_fallback"):
        return []
    return [
        f"mlx-lm writes every tokenizer into {GGUF_FILE} as a SentencePiece one, and this is none: "
        "llama.cpp will split text in another way than the model was trained for."
    ]
