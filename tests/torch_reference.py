"""IFPruning in PyTorch as CHECKPOINT layouts define it, written for comparison, and its savers.

Everything runs in float32 unless told otherwise. B prompts, L layers, F = d_ffn channels.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from .conftest import tiny_tokenizer

VOCAB = 384
P = 128
LLM = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 75,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
BACKBONE = LLM | {
    "hidden_size": 48,
    "head_dim": 12,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}
VISION = {
    "gemma3": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    },
    "gemma4": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "head_dim": 8,
    },
    "qwen3_5": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 32,
    },
}
EXTRA = {
    "qwen3_5_text": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0,
                            "partial_rotary_factor": 0.5},
    },
    "glm4": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": None},
    "gemma2": {"hidden_size": 64, "tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    # mlx-lm rounds sqrt(hidden_size), Gemma's scale of embeddings, to bfloat16; that of 64 is 8.
    "gemma3_text": {
        "hidden_size": 64,
        "sliding_window": 64,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "gemma4_text": {
        "hidden_size": 64,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 64,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 16,
    },
}  # fmt: skip


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Every weight, bias and norm random: an error in any of them must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return model.eval().float()


def make_llm(architecture: str = "llama", seed: int = 0, **overrides) -> nn.Module:
    """A tiny causal LM of transformers; ``gemma3``, ``gemma4`` and ``qwen3_5`` are multimodal."""
    text = f"{architecture}_text" if architecture in VISION else architecture
    values = LLM | EXTRA.get(text, {}) | overrides
    if architecture not in VISION:
        config = transformers.AutoConfig.for_model(architecture, **values)
        return randomized(transformers.AutoModelForCausalLM.from_config(config), seed)
    inner = transformers.AutoConfig.for_model(text, **values)
    tie = {"tie_word_embeddings": values["tie_word_embeddings"]}
    config = transformers.AutoConfig.for_model(
        architecture, text_config=inner.to_dict(), vision_config=VISION[architecture], **tie
    )
    name = {"gemma3": "Gemma3", "gemma4": "Gemma4", "qwen3_5": "Qwen3_5"}[architecture]
    made = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return randomized(made, seed)


def text_config(llm: nn.Module):
    """The config of the text model."""
    return llm.config.get_text_config()


class Predictor(nn.Module):
    """A backbone's last hidden state at the last real token, a head, and scores [B, L, F].

    Args:
        backbone: a body (``AutoModel``).
        head: D -> P -> L * F.
        shape: (L, F).
        normalize: LayerNorm without parameters before the head.
    """

    def __init__(self, backbone, head, shape, normalize=False):
        super().__init__()
        self.backbone, self.head, self.shape, self.normalize = backbone, head, shape, normalize

    def forward(self, ids, attention_mask):
        hidden = self.backbone(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(-1) - 1
        feature = hidden[torch.arange(len(ids)), last]
        if self.normalize:
            feature = nn.functional.layer_norm(feature.float(), feature.shape[-1:], eps=1e-5)
        return self.head(feature).reshape(len(ids), *self.shape)


def make_backbone(architecture: str = "llama", seed: int = 1, **overrides) -> nn.Module:
    """A tiny body without an output layer."""
    values = BACKBONE | EXTRA.get(architecture, {}) | overrides
    if "layer_types" in values:
        start = "full_attention" in values["layer_types"][:2]
        values["layer_types"] = values["layer_types"][:2] if start else values["layer_types"][1:]
    config = transformers.AutoConfig.for_model(architecture, **values)
    return randomized(transformers.AutoModel.from_config(config), seed)


def make_head(kind: str, features: int, scores: int, seed: int = 2) -> nn.Module:
    """The head of a layout."""
    one, two = nn.Linear(features, P), nn.Linear(P, scores, bias=kind != "manifest")
    layers = {
        "split": (one, nn.GELU(), two),
        "module": (one, two),
        "manifest": (one, nn.LeakyReLU(0.1), two),
    }[kind]
    return randomized(nn.Sequential(*layers), seed)


def soft_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """sigmoid(scores - nu) with the nu that makes the sum k; in float64, by bisection."""
    z = scores.double()
    low, high = z.min(-1, keepdim=True).values - 50, z.max(-1, keepdim=True).values + 50
    for _ in range(200):
        nu = (low + high) / 2
        over = torch.sigmoid(z - nu).sum(-1, keepdim=True) > k
        low, high = torch.where(over, nu, low), torch.where(over, high, nu)
    return torch.sigmoid(z - nu).float()


def first_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest, ties to the lower index: bool like scores."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def make_mask(scores: torch.Tensor, k: int, soft: bool) -> torch.Tensor:
    """The mask at inference, float32 [..., L, F]."""
    kept = first_topk(scores, k).float()
    return kept * soft_topk(scores, k) if soft else kept


@torch.no_grad()
def logits_of(llm: nn.Module, ids: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [tokens, vocab] of one prompt; mask [L, F] multiplies the FFN's activations."""
    downs = [m for n, m in llm.named_modules() if n.endswith("mlp.down_proj")
             and "vis" not in n]  # fmt: skip
    hooks = []
    if mask is not None:
        for down, row in zip(downs, mask, strict=True):
            hooks.append(
                down.register_forward_pre_hook(
                    lambda _, args, row=row: (args[0] * row.to(args[0]),)
                )
            )
    try:
        return llm(input_ids=torch.tensor([ids])).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def scores_of(predictor: Predictor, prompts: list[list[int]]) -> torch.Tensor:
    """Scores [B, L, F] of prompts in one right-padded batch."""
    length = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (length - len(p)) for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (length - len(p)) for p in prompts])
    return predictor(ids, mask)


def predictor_for(llm: nn.Module, kind: str, architecture: str = "llama", **overrides) -> Predictor:
    """A random predictor for an LLM."""
    config = text_config(llm)
    shape = (config.num_hidden_layers, config.intermediate_size)
    backbone = make_backbone(architecture, **overrides)
    head = make_head(kind, backbone.config.get_text_config().hidden_size, shape[0] * shape[1])
    return Predictor(backbone, head, shape, normalize=kind == "manifest")


# -- savers: the calls that a trainer makes


def save_split(path: Path, llm, predictor, k: int, method: str = "soft", legacy=False) -> Path:
    """``llama/``, ``extractor.pt``, ``mask_head.pt`` and ``predictor_meta.json``."""
    llm.save_pretrained(path / "llama")
    how = {"_use_new_zipfile_serialization": not legacy}
    torch.save(predictor.backbone.state_dict(), path / "extractor.pt", **how)
    torch.save(predictor.head.state_dict(), path / "mask_head.pt", **how)
    layers, d_ffn = predictor.shape
    meta = {
        "num_layers": layers,
        "intermediate_size": d_ffn,
        "topk": k,
        "mask_method": method,
        "head_hidden_dim": P,
        "extractor_config": predictor.backbone.config.to_dict(),
    }
    (path / "predictor_meta.json").write_text(json.dumps(meta, default=str))
    return path


def save_tensors(tensors, path: Path) -> None:
    """safetensors wants every tensor contiguous and on its own."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


class Module(nn.Module):
    """The module whose state dict is the layout of that name."""

    def __init__(self, llm, feature_extractor, head):
        super().__init__()
        self.llm = llm
        self.sparsity_predictor = nn.Module()
        self.sparsity_predictor.feature_extractor = feature_extractor
        self.sparsity_predictor.prediction_head1 = head[0]
        self.sparsity_predictor.prediction_head2 = head[-1]


def module_of(llm, tied: bool) -> tuple[Module, Predictor]:
    """The module, and a predictor that shares its weights."""
    values = BACKBONE | {"tie_word_embeddings": tied}
    config = transformers.AutoConfig.for_model("qwen2", **values)
    extractor = randomized(transformers.AutoModelForCausalLM.from_config(config), 1)
    shape = (llm.config.num_hidden_layers, llm.config.intermediate_size)
    head = make_head("module", config.hidden_size, shape[0] * shape[1])
    return Module(llm, extractor, head), Predictor(extractor.model, head, shape)


def save_configs(path: Path, module: Module) -> Path:
    """What the layout lacks and the user names: two ``config.json``, one tokenizer."""
    module.llm.config.save_pretrained(path / "llm")
    module.sparsity_predictor.feature_extractor.config.save_pretrained(path / "backbone")
    tiny_tokenizer().save_pretrained(path / "tokenizer")
    return path


def save_manifest(path: Path, llm, predictor, k: int, temperature: float = 0.5) -> Path:
    """An LLM's directory with ``predictor.safetensors`` and what belongs to it."""
    llm.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path / "predictor_tokenizer")
    predictor.backbone.config.save_pretrained(path.parent / f"{path.name}-backbone")
    tensors = {f"extractor.{n}": t for n, t in predictor.backbone.state_dict().items()}
    tensors |= {f"mlp.{n}": t for n, t in predictor.head.state_dict().items()}
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()}, path / "predictor.safetensors"
    )
    layers, d_ffn = predictor.shape
    manifest = {
        "chat_template_format": "anything",
        "num_layers": layers,
        "full_intermediate_dim": d_ffn,
        "target_intermediate_dim": k,
        "predictor_model": str(path.parent / f"{path.name}-backbone"),
        "predictor_hidden_dim": P,
        "mask_temperature": temperature,
        "softtopk_iters": 30,
    }
    (path / "ifpruning_config.json").write_text(json.dumps(manifest))
    return path
