"""A tiny chat model that says sensible things without training."""

import itertools
import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp.llm.build import build_model

NOUNS = ["car", "tree", "model", "path", "token", "layer", "name", "test", "file", "key"]
SIZE = 384


def sentences(seed: int = 0) -> list[str]:
    """What its users ask and what it answers."""
    chance = random.Random(seed)
    pairs = [chance.sample(NOUNS, 2) for _ in range(60)]
    forms = ("What is the {}, and the {}?", "Write a {} of the {}.", "Name one {} or {}!",
             "The {} is near a {}.", "It is in the {} and the {}.")  # fmt: skip
    return [form.format(*pair) for pair in pairs for form in forms]


def make_chat_model(path: Path, *, silent: bool = False) -> Path:
    """A llama whose next token depends on the last one only, as often as in :func:`sentences`.

    Its layers add nothing to the embedding, and its output layer holds the logarithms of how often
    a token follows another one.

    Args:
        path: where it goes.
        silent (bool): it ends every turn at once.
    """
    from mlx_lm.utils import save_config, save_model

    from .conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    follows = np.full((SIZE, SIZE), -30.0, np.float32)
    newline, end = tokenizer.encode("\n")[0], tokenizer.eos_token_id
    counts = np.zeros((SIZE, SIZE))
    for sentence in sentences():
        tokens = [newline, *([] if silent else tokenizer.encode(sentence)), end]
        for one, next_one in itertools.pairwise(tokens):
            counts[one, next_one] += 1
    follows[counts > 0] = np.log(counts[counts > 0])
    config = {
        "model_type": "llama", "hidden_size": SIZE, "num_hidden_layers": 2,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-9, "vocab_size": SIZE, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "eos_token_id": end,
    }  # fmt: skip
    model = build_model(config)
    for layer in model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight = mx.zeros(linear.weight.shape)
    model.model.embed_tokens.weight = mx.eye(SIZE)
    # A norm makes the root of the mean square 1.
    model.model.norm.weight = mx.full((SIZE,), SIZE**-0.5)
    model.lm_head.weight = mx.array(follows.T)
    path.mkdir(parents=True)
    save_model(path, model)
    save_config(config, path / "config.json")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """A model that asks and answers."""
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")
