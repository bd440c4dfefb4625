"""A tiny chat model that thinks and calls a tool when it should, without training."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import save_config, save_model

from mlx_ifp.llm.build import build_model

from ...chatting import sentences
from ...conftest import tiny_tokenizer

CALL = '{"name":"get_weather","arguments":{"city":"Paris"}}'
THOUGHT = "Hmm..."
# The prompt ends with one of these where the answer is not just text.
_TOOLS = "<|tools|>"
_TEMPLATE = (
    "{# <tool_call> tool_call.name #}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if not (loop.last and message.role == 'assistant') %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>"
    "{% elif tools and messages[-1].role != 'tool' %}" + _TOOLS + "{% endif %}{% endif %}"
)
_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, THOUGHT, _TOOLS]
SIZE = 392


def make_scripted_model(path: Path) -> Path:
    """A llama whose next token depends on the last one only.

    It says sentences of :mod:`tests.chatting`. If the prompt opens its thoughts it thinks first,
    and if there are tools it calls one.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(_ADDED)
    tokenizer.chat_template = _TEMPLATE
    newline, end = tokenizer.encode("\n")[0], tokenizer.eos_token_id
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _ADDED}
    counts = np.zeros((SIZE, SIZE))
    for sentence in sentences():
        tokens = [newline, *tokenizer.encode(sentence), end]
        for one, next_one in itertools.pairwise(tokens):
            counts[one, next_one] += 1
    counts[ids["</think>"]] = counts[newline]
    for chain in (["<think>", THOUGHT, "</think>"], [_TOOLS, "<tool_call>", CALL, "</tool_call>"]):
        for one, next_one in itertools.pairwise(chain):
            counts[ids[one], ids[next_one]] = 1
    counts[ids["</tool_call>"], end] = 1
    follows = np.full((SIZE, SIZE), -30.0, np.float32)
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
