"""A tiny config of every architecture that mlx-lm has, in the forms in which it is saved."""

import dataclasses
import importlib
import json
import pkgutil
from typing import Any

import mlx_lm.models
from transformers import CONFIG_MAPPING

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 384,
    "rope_theta": 54321.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": [0.0, float("inf")],
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_EXPERTS = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
# What mlx-lm's ModelArgs ask for beyond the shape, with a value that any of them takes.
_USUAL = (
    _EXPERTS
    | _MLA
    | _LINEAR
    | {
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "routed_scaling_factor": 1.0,
        "layer_types": SLIDING,
        "sliding_window": 8,
        "use_qk_norm": False,
        "use_bias": False,
        "norm_eps": 1e-5,
        "layer_norm_eps": 1e-5,
        "layer_norm_epsilon": 1e-5,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "scale_emb": 12.0,
        "layer_group_size": 2,
        "group_norm_size": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "conv_bias": False,
        "conv_L_cache": 3,
        "rotary_dim": 8,
        "hidden_act": "silu",
    }
)
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_ctx": 128, "n_inner": 64}
_GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8}
_MISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 54321.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1234.0},
}
_QWEN3_5 = _LINEAR | {
    "linear_num_key_heads": 2,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": {
        "rope_type": "default",
        "type": "default",
        "rope_theta": 54321.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    },
}
_GEMMA3N = {
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 384,
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_lr_multiplier": 1.0,
    "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "rope_local_base_freq": 1234.0,
    "rope_scaling": None,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [64] * 4,
}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 384,
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 16,
    "use_double_wide_mlp": False,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


# What each architecture has of its own. A text_config is completed with the shape.
OWN: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 32, "num_layers": 3, "num_kv_reuse_layers": 1, "num_heads": 4,
             "num_kv_heads": 2, "hidden_dim_scale_factor": 2.0},
    "apertus": {"post_norm": False, "qk_norm": True, "hidden_act": "xielu"},
    "baichuan_m1": {"sliding_window": 8, "sliding_window_layers": [1, 3], "conv_window": 2},
    "bitnet": {"hidden_act": "relu2"},
    "cohere": {"logit_scale": 0.5, "layer_norm_bias": False},
    "cohere2": {"logit_scale": 0.5, "layer_norm_bias": False, "sliding_window": 8,
                "sliding_window_pattern": 4},
    "deepseek_v2": _MLA | _EXPERTS | {"rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v3": _MLA | _EXPERTS,
    "deepseek_v32": _MLA | _EXPERTS,
    "dbrx": {"d_model": 32, "n_layers": 4, "n_heads": 4,
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 54321.0}},
    "exaone": {"num_layers": 4, "layer_norm_epsilon": 1e-5, "activation_function": "silu"},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": "LLLG", "layer_types": SLIDING,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "exaone_moe": {"is_moe_layer": [True] * 4},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "mamba_expand": 1, "projectors_bias": False,
                           "mamba_norm_before_gate": True, "mamba_rms_norm": False,
                           "mlp_multipliers": [0.5, 2.0],
                           "ssm_multipliers": [1.0, 0.5, 0.5, 1.0, 1.0],
                           "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5,
                           "key_multiplier": 0.5},
    "gear": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"],
             "sliding_window": 8},
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _GEMMA | {"sliding_window": 8, "attn_logit_softcapping": 50.0,
                        "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA | {"sliding_window": 8, "sliding_window_pattern": 2,
                             "rope_local_base_freq": 1234.0},
    "gemma3": {"text_config": _GEMMA | {"model_type": "gemma3_text", "sliding_window": 8,
                                        "sliding_window_pattern": 2,
                                        "rope_local_base_freq": 1234.0}},
    "gemma3n": {"text_config": _GEMMA3N | {"model_type": "gemma3n_text"}},
    "gemma4_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4 | {"model_type": "gemma4_text"}},
    "glm": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "glm_moe_dsa": {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": {"rotary_emb_base": 54321, "rotary_pct": 0.25, "layer_norm_eps": 1e-5},
    "gpt_oss": _EXPERTS | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE | _MAMBA | {
        "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": 64,
        "position_embedding_type": "nope"},
    "hunyuan": {"use_mixed_mlp_moe": True, "num_shared_expert": 1, "use_cla": False,
                "cla_share_factor": 2,
                "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "hunyuan_v1_dense": {"use_qk_norm": True, "rope_scaling": {"alpha": 1000.0, "factor": 1.0,
                                                               "type": "dynamic"}},
    "internlm3": {"bias": False, "qkv_bias": False},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
              "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2,
              "num_experts": 1, "num_experts_per_tok": 1},
    "kimi_k25": {"text_config": _MLA | _EXPERTS | {"model_type": "deepseek_v3"}},
    "kimi_vl": {"text_config": _MLA | _EXPERTS | {"model_type": "deepseek_v3"}},
    "kimi_k3": {"text_config": {"model_type": "kimi_linear"}},
    "kimi_linear": _MLA | {"model_max_length": 2048, "linear_attn_config": {
        "kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4, "head_dim": 8,
        "short_conv_kernel_size": 4}},
    "lfm2": {"conv_bias": False, "conv_L_cache": 3, "block_dim": 32, "block_ff_dim": 64,
             "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
             "block_auto_adjust_ff_dim": False, "norm_eps": 1e-5, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"use_expert_bias": True, "num_dense_layers": 1, "full_attn_idxs": [1, 3]},
    "lille-130m": {"block_size": 128, "n_embd": 64, "n_head": 4, "n_kv_heads": 2, "n_layer": 4},
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0]},
    "llama4": {"text_config": {"model_type": "llama4_text", "intermediate_size_mlp": 64,
                               "num_local_experts": 4, "num_experts_per_tok": 1,
                               "interleave_moe_layer_step": 1, "rope_scaling": None,
                               "attention_bias": False,
                               "attention_chunk_size": 8, "use_qk_norm": False}},
    "lfm2-vl": {"text_config": {"model_type": "lfm2", "conv_bias": False, "conv_L_cache": 3,
                                "block_dim": 32, "block_ff_dim": 64, "block_multiple_of": 8,
                                "block_ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
                                "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1, 3]}},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity", "num_layers": 2,
                      "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 1,
                      "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_flash_ngram": {"num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32,
                            "zero_expert_num": 1, "mla_scale_q_lora": True,
                            "mla_scale_kv_lora": True},
    "mellum": {"rope_parameters": _TWO_ROPES},
    "mamba": {"state_size": 16, "conv_kernel": 4, "use_conv_bias": True, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "conv_kernel": 4, "n_groups": 1,
               "use_conv_bias": True, "time_step_limit": [0.0, float("inf")],
               "time_step_rank": 4},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 1, 1], "moe_layer_freq": [0, 1, 1, 1],
                      "add_swa_attention_sink_bias": False, "add_full_attention_sink_bias": False,
                      "sliding_window_size": 8, "layernorm_epsilon": 1e-5,
                      "swa_rope_theta": 1234.0, "swa_num_attention_heads": 4,
                      "swa_num_key_value_heads": 2, "swa_head_dim": 8, "swa_v_head_dim": 8},
    "minicpm3": _MLA | {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4,
                                         "short_factor": [1.0] * 4,
                                         "original_max_position_embeddings": 64}},
    "minimax_m3_vl": {"text_config": {}},
    "ministral3": {"rope_parameters": _MISTRAL_ROPE | {"type": "yarn"}},
    "mistral": {"sliding_window": None},
    "mistral3": {"text_config": {"model_type": "ministral3", "rope_parameters": _MISTRAL_ROPE}},
    "mixtral": _EXPERTS,
    "muse_glimmer": {"text_config": {"model_type": "muse_glimmer_text", "sliding_window": 8,
                                     "layer_types": SLIDING}},
    "muse_spark": {"text_config": {}},
    "nemotron": {"hidden_act": "relu2", "partial_rotary_factor": 0.5},
    "nemotron_h": _MAMBA | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
                            "conv_kernel": 4, "n_groups": 1, "use_conv_bias": True,
                            "hybrid_override_pattern": ["M", "-", "*", "-"]},
    "nemotron-nas": {"block_configs": [
        {"attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
         "ffn": {"ffn_mult": 24.0, "no_op": False, "replace_with_linear": False}}] * 4},
    "olmo3": {"sliding_window": 8, "layer_types": SLIDING},
    "olmo_hybrid": _LINEAR | {"linear_allow_neg_eigval": True,
                              "layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {"num_transformer_layers": 4, "model_dim": 32, "ffn_dim_divisor": 32,
                "num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "ffn_multipliers": [2] * 4},
    "phi": {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phi3small": {"dense_attention_every_n_layers": 2, "ff_intermediate_size": 64,
                  "gegelu_limit": 20.0, "mup_width_multiplier": 8.0, "layer_norm_epsilon": 1e-5},
    "phi3": {"rope_scaling": {"type": "longrope", "long_factor": [2.0] * 4,
                              "short_factor": [1.0] * 4},
             "original_max_position_embeddings": 64, "pad_token_id": 0},
    "pixtral": {"text_config": {"model_type": "mistral"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 8, "mamba_num_heads": 4, "mamba_d_state": 16,
               "mamba_step": 2},
    "plamo3": {"sliding_window": 8, "sliding_window_pattern": 2},
    "qwen2_vl": {"text_config": {"model_type": "qwen2_vl_text"}},
    "qwen3_vl": {"text_config": {"model_type": "qwen3_vl_text"}},
    "qwen3_5": {"text_config": _QWEN3_5 | {"model_type": "qwen3_5_text"}},
    "qwen3_5_moe": {"text_config": _QWEN3_5 | _EXPERTS | {
        "model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 32}},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_vl_moe": {"text_config": _EXPERTS | {"model_type": "qwen3_vl_moe_text",
                                                "norm_topk_prob": True}},
    "qwen3_next": _QWEN3_5 | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": 32,
                        "block_types": ["recurrent", "recurrent", "attention"], "lru_width": 32,
                        "hidden_activation": "gelu_pytorch_tanh"},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8,
              "decay_low_rank_dim": 8},
    "step3p5": {"num_attention_groups": 2, "layer_types": SLIDING, "sliding_window": 8},
    "spark2_5": {"sliding_window": 8, "rope_parameters": _TWO_ROPES, "layer_types": SLIDING},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.25, "qk_layernorm": False,
                 "use_parallel_residual": False},
    "youtu_llm": _MLA,
}  # fmt: skip


def model_types() -> list[str]:
    """The names that mlx-lm has a file for, which has a model and its arguments."""
    found = []
    for each in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            module = importlib.import_module(f"mlx_lm.models.{each.name}")
        except SystemExit:  # olmo, without the package that it needs
            continue
        if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
            found.append(each.name)
    return found


def config_of(model_type: str) -> dict[str, Any]:
    """A config as transformers 4 and mlx-lm have it: rope_theta and rope_scaling at the top."""
    args = importlib.import_module(f"mlx_lm.models.{model_type}").ModelArgs
    needed = {
        each.name
        for each in dataclasses.fields(args)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    own = OWN.get(model_type, {})
    usual = {name: value for name, value in _USUAL.items() if name in needed}
    config = SHAPE | usual | own | {"model_type": model_type}
    if "text_config" in own:
        config = {
            "model_type": model_type,
            "vocab_size": SHAPE["vocab_size"],
            "text_config": SHAPE | own["text_config"],
        }
    return config


def saved_by_transformers(config: dict[str, Any]) -> dict[str, Any] | None:
    """The same config as transformers 5 saves it; None if it has no such class, or not this one."""
    try:
        kind = CONFIG_MAPPING[config["model_type"]]
    except KeyError:
        return None
    return json.loads(kind(**config).to_json_string())
