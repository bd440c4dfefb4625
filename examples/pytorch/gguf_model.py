"""A llama-architecture GGUF file as a transformers directory: config, float weights, tokenizer.

    python gguf_model.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2

transformers can read GGUF files itself (``from_pretrained(..., gguf_file=...)``). It is not used
here: it cannot save what it read, its normalisation epsilon is not the file's decimal number, and
what it does differs between its versions. The package ``gguf`` reads the file and decodes the
weights; this script only names things.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from output import new_directory
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# How byte-level BPE splits text before it merges, by llama.cpp's names.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "starcoder": [r"\p{N}", _GPT2],
}
# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """The metadata and the tensors, still encoded, of a GGUF file."""
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the package raises many kinds
        raise SystemExit(f"gguf_model.py: {path} cannot be read as GGUF ({error}).") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise SystemExit(
            f"gguf_model.py: {path} has the architecture {architecture!r}, only 'llama' is "
            "supported; give a transformers directory to the other scripts instead."
        )
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def make_config(metadata: dict[str, Any], tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    """The ``config.json`` of a transformers llama."""
    own = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    scaled = "rope_freqs.weight" in tensors or own.get("rope.scaling.type", "none") != "none"
    if scaled or own.get("expert_count"):
        raise SystemExit(
            "gguf_model.py: rope scaling and experts are not supported; give a transformers "
            "directory to the other scripts instead."
        )
    heads, hidden = own["attention.head_count"], own["embedding_length"]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": own.get("attention.key_length", hidden // heads),
        # ReaderTensor.shape has the fastest axis first.
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": own["context_length"],
        # A float32 in the file: its shortest decimal form is what was meant.
        "rms_norm_eps": float(str(np.float32(own["attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(own.get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def tensor_names(layers: int) -> Iterator[tuple[str, str]]:
    """GGUF's name and transformers' name of every module of a llama."""
    yield from (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"))
    yield "output", "lm_head"
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for i in range(layers):
        yield from (
            (f"blk.{i}.{theirs}", f"model.layers.{i}.{ours}") for theirs, ours in parts.items()
        )


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, ...]: of each head, llama.cpp interleaves the halves that HF rotates."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def decode_weights(
    tensors: dict[str, gguf.ReaderTensor], config: dict[str, Any]
) -> dict[str, np.ndarray]:
    """transformers' names -> float32 arrays."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    left = set(tensors)
    for theirs, ours in tensor_names(config["num_hidden_layers"]):
        for part in ("weight", "bias"):
            tensor = tensors.get(f"{theirs}.{part}")
            if tensor is None:
                continue
            left.discard(tensor.name)
            shape = tuple(int(n) for n in reversed(tensor.shape))
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
            array = array.astype(np.float32).reshape(shape)
            own = heads.get(ours.rpartition(".")[2])
            weights[f"{ours}.{part}"] = np.ascontiguousarray(
                unpermute(array, own) if own else array
            )
    if left:
        raise SystemExit(f"gguf_model.py: the tensor {sorted(left)[0]} is none of a llama's.")
    return weights


def make_tokenizer(metadata: dict[str, Any], max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template and special tokens."""
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or pre not in SPLITS:
        raise SystemExit(
            f"gguf_model.py: the tokenizer ({kind}, {pre}) is not supported; give a transformers "
            "directory to the other scripts instead."
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    splits = [pre_tokenizers.Split(Regex(text), "isolated") for text in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    types = metadata["tokenizer.ggml.token_type"]
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=type_ != USER_DEFINED)
            for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
            if type_ in (UNKNOWN, CONTROL, USER_DEFINED) or i in ids.values()
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )


def convert(source: Path, output: Path, dtype: str = "float32") -> Path:
    """Write the transformers directory ``output`` from the GGUF file ``source``."""
    metadata, tensors = read_gguf(source)
    config = make_config(metadata, tensors)
    config["dtype"] = dtype
    weights = decode_weights(tensors, config)
    tokenizer = make_tokenizer(metadata, config["max_position_embeddings"])
    with new_directory(output) as directory:
        weights = {name: array.astype(dtype) for name, array in weights.items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(directory)
    return output


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="GGUF")
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="a directory that is not there yet"
    )
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    args = parser.parse_args(argv)
    convert(args.source, args.output, args.dtype)
    print(f"{args.output}: {args.source.name} as a transformers model in {args.dtype}.")


if __name__ == "__main__":
    sys.exit(main())
