"""Models for the tests: the real SmolLM2-135M-Instruct, and tiny ones of every architecture."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_ifp.checkpoint.config import HeadConfig, IFPConfig, MaskConfig, TextConfig
from mlx_ifp.checkpoint.directory import write_checkpoint
from mlx_ifp.checkpoint.precision import Precision
from mlx_ifp.convert import convert
from mlx_ifp.convert.dense import load_dense
from mlx_ifp.convert.plan import plan_dense
from mlx_ifp.files.atomic import new_directory
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.modules import find_body

from . import running

# Fixtures are found here.
from .chatting import chat_model  # noqa: F401
from .training import data, options  # noqa: F401

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if not (loop.last and message.role == 'assistant') %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 384,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "mlp_bias": True,
}

# One tiny config for each architecture that the README names.
ARCHITECTURES = {
    "llama": _SHAPE,
    "mistral": _SHAPE,
    "qwen2": _SHAPE,
    "qwen3": _SHAPE,
    "smollm3": _SHAPE | {"no_rope_layers": [1, 1, 0]},
    "gemma2": _SHAPE,
    "gemma3_text": _SHAPE | {"sliding_window": 32, "sliding_window_pattern": 2},
    "granite": _SHAPE | _GRANITE,
    "olmo2": _SHAPE,
    "phi3": _SHAPE | {"tie_word_embeddings": False},
    "glm4": _SHAPE | {"attention_bias": True, "partial_rotary_factor": 0.5},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees the user's cache or another test's, nor the network."""
    monkeypatch.setenv("MLX_IFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE tokenizer of 384 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(Path(__file__).with_name("tokenizer_text.txt"))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_dense(path: Path, architecture: str = "llama", seed: int = 0, **overrides) -> Path:
    """A tiny dense model directory, as ``mlx_lm.convert`` writes one, with random weights."""
    config = ARCHITECTURES[architecture] | {"model_type": architecture} | overrides
    model = build_model(config)
    keys = mx.random.split(mx.random.key(seed), 1000)
    # Every weight, bias and norm random: an error in any of them must show.
    arrays = [
        (name, 0.08 * mx.random.normal(array.shape, key=key) + (array.ndim == 1))
        for key, (name, array) in zip(keys, tree_flatten(model.parameters()), strict=False)
    ]
    model.update(tree_unflatten(arrays))
    path.mkdir(parents=True, exist_ok=True)
    save_model(path, model)
    save_config(config, path / "config.json")
    tiny_tokenizer().save_pretrained(path)
    return path


def make_predictor_checkpoint(
    path: Path,
    architecture: str = "qwen2",
    *,
    activation: str = "gelu",
    feature_norm: str = "none",
    biases: tuple[bool, ...] = (True, True),
    mask: MaskConfig | None = None,
    text: TextConfig | None = None,
    k: int | list[int] = 64,
    backbone: dict | None = None,
    llm: dict | None = None,
) -> tuple[Path, Path]:
    """A checkpoint of a tiny llama with a predictor, random weights in both.

    Returns the checkpoint and the backbone's own directory.
    """
    work = path.with_name(f"{path.name}-parts")
    dense = make_dense(work / "llm", "llama", **(llm or {}))
    shape = {"hidden_size": 48, "head_dim": 12} | (backbone or {})
    backbone_dir = make_dense(work / "backbone", architecture, seed=7, **shape)
    parts = plan_dense(load_dense(str(dense), dense), k, Precision(), "raw")
    model, config = load_model(backbone_dir)
    prefix = f"{find_body(model)}."
    arrays = {n: a for n, a in tree_flatten(model.parameters()) if n.startswith(prefix)}
    widths = [shape["hidden_size"], 128, parts.layers * parts.d_ffn]
    head = {}
    for i in range(2):
        keys = mx.random.split(mx.random.key(30 + i))
        head[f"linear{i + 1}.weight"] = 0.3 * mx.random.normal(
            (widths[i + 1], widths[i]), key=keys[0]
        )
        if biases[i]:
            head[f"linear{i + 1}.bias"] = mx.random.normal((widths[i + 1],), key=keys[1])
    ifp = IFPConfig(
        k=k,
        selector="predictor",
        mask=mask or MaskConfig(),
        text=text or TextConfig(),
        head=HeadConfig(widths, list(biases), activation, feature_norm),
    )
    tensors = parts.tensors | {"predictor/model": arrays, "predictor/head": head}
    with new_directory(path) as directory:
        write_checkpoint(directory, parts.config, ifp, tensors)
        parts.tokenizer.save_pretrained(directory)
        save_config(config, directory / "predictor" / "config.json")
        tiny_tokenizer().save_pretrained(directory / "predictor")
    return path, backbone_dir


@pytest.fixture(scope="session")
def predictor_checkpoint(tmp_path_factory) -> Path:
    """A tiny llama with a trained-style predictor, k = 64 of 160, hard mask."""
    return make_predictor_checkpoint(tmp_path_factory.mktemp("ifp") / "predictor")[0]


@pytest.fixture(scope="session")
def dense_llama(tmp_path_factory) -> Path:
    """A tiny dense llama."""
    return make_dense(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="session")
def tiny_checkpoint(dense_llama, tmp_path_factory) -> Path:
    """Its checkpoint, k = 64 of 160."""
    return convert(str(dense_llama), tmp_path_factory.mktemp("ifp") / "tiny", keep=64)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as examples/fetch_smollm2.py leaves it."""
    own = os.environ.get("MLX_IFP_TEST_GGUF")
    folder = Path(__file__).resolve().parents[1] / "examples" / "smollm2"
    path = Path(own) if own else folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.fail(f"{path} is missing; run: python examples/fetch_smollm2.py", pytrace=False)
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory) -> Path:
    """The real model's checkpoint, k = 768 of 1,536."""
    return convert(str(smollm2_gguf), tmp_path_factory.mktemp("ifp") / "smollm2", keep=0.5)


def run_command(*args: object, stdin: str = "", **kwargs) -> subprocess.CompletedProcess:
    """Run ``mlx_ifp.COMMAND ...`` as a user does, in a process of its own."""
    name, *rest = [str(arg) for arg in args]
    script = Path(sys.executable).with_name(f"mlx_ifp.{name}" if name else "mlx_ifp")
    return running.run(
        [str(script), *rest], input=stdin, capture_output=True, text=True, timeout=600, **kwargs
    )
