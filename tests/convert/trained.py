"""Trained checkpoints of every layout whose predictor is the first layers of its LLM."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..conftest import make_dense, tiny_tokenizer

LAYERS, D_FFN, K, HIDDEN, WIDTH = 3, 160, 64, 64, 16


def save_run(path: Path, layout: str, change: Any = None, *, llm: dict | None = None) -> dict:
    """Write a run; its LLM is tiny and its predictor has two of the LLM's layers.

    Args:
        path: a directory that does not exist.
        layout: ``split``, ``module`` or ``manifest``.
        change: called with the backbone's tensors, by the names of a body, to change them.
        llm: values of the LLM's config.

    Returns:
        dict: arguments of convert().
    """
    dense = make_dense(path.with_name(f"{path.name}-llm"), **(llm or {}))
    config = json.loads((dense / "config.json").read_text())
    backbone_config = config | {"num_hidden_layers": 2}
    arrays = dict(mx.load(str(dense / "model.safetensors")))
    parts = ("embed_tokens.", "layers.0.", "layers.1.", "norm.")
    body = {
        name.removeprefix("model."): array
        for name, array in arrays.items()
        if name.removeprefix("model.").startswith(parts)
    }
    if change is not None:
        change(body)
    head = head_tensors(layout)
    path.mkdir()
    if layout == "split":
        shutil.copytree(dense, path / "llama")
        mx.save_safetensors(str(path / "extractor.safetensors"), body)
        mx.save_safetensors(str(path / "mask_head.safetensors"), head)
        meta = {
            "num_layers": LAYERS,
            "intermediate_size": D_FFN,
            "topk": K,
            "mask_method": "st",
            "extractor_config": backbone_config,
        }
        (path / "predictor_meta.json").write_text(json.dumps(meta))
        return {"model": str(path), "predictor_tokenizer": str(dense)}
    if layout == "module":
        (path / "backbone.json").write_text(json.dumps(backbone_config))
        tensors = {f"llm.{name}": array for name, array in arrays.items()}
        tensors |= {
            f"sparsity_predictor.feature_extractor.model.{name}": array
            for name, array in body.items()
        }
        tensors |= {f"sparsity_predictor.{name}": array for name, array in head.items()}
        mx.save_safetensors(str(path / "model.safetensors"), tensors)
        return {
            "model": str(path / "model.safetensors"),
            "llm_config": str(dense),
            "predictor_config": str(path / "backbone.json"),
            "tokenizer": str(dense),
            "predictor_tokenizer": str(dense),
            "keep": K,
        }
    shutil.copytree(dense, path, dirs_exist_ok=True)
    tensors = {f"extractor.{name}": array for name, array in body.items()}
    mx.save_safetensors(str(path / "predictor.safetensors"), tensors | head)
    (path / "predictor_config").mkdir()
    (path / "predictor_config" / "config.json").write_text(json.dumps(backbone_config))
    tiny_tokenizer().save_pretrained(path / "predictor_tokenizer")
    manifest = {
        "num_layers": LAYERS,
        "full_intermediate_dim": D_FFN,
        "target_intermediate_dim": K,
        "predictor_model": "/trained/elsewhere",
    }
    (path / "ifpruning_config.json").write_text(json.dumps(manifest))
    return {"model": str(path), "predictor_config": str(path / "predictor_config")}


def save_own_state_run(path: Path, **manifest: Any) -> Path:
    """Write a run of the layout "manifest" whose head reads the LLM's own state.

    Args:
        path: a directory that does not exist; beside it is the LLM alone, ``NAME-llm``.
        manifest: more fields; None takes one out.
    """
    save_run(path, "manifest")
    for name in ("predictor_config", "predictor_tokenizer"):
        shutil.rmtree(path / name)
    mx.save_safetensors(str(path / "predictor.safetensors"), head_tensors("manifest"))
    said = {"predictor_model": None, "predictor_backbone": "llm", "prefill": "dense"}
    said |= {"predictor_hidden_dim": WIDTH, "chat_template_format": "chat"}
    edit_json(path / "ifpruning_config.json", **said | manifest)
    return path


def head_tensors(layout: str) -> dict[str, mx.array]:
    """A random head under a layout's names."""
    names, keys = HEADS[layout], mx.random.split(mx.random.key(5), 4)
    shapes = [(WIDTH, HIDDEN), (WIDTH,), (LAYERS * D_FFN, WIDTH), (LAYERS * D_FFN,)]
    return {
        name: mx.random.normal(shape, key=key)
        for name, shape, key in zip(names, shapes, keys, strict=False)
    }


HEADS = {
    "split": ("0.weight", "0.bias", "2.weight", "2.bias"),
    "module": (
        *("prediction_head1.weight", "prediction_head1.bias"),
        *("prediction_head2.weight", "prediction_head2.bias"),
    ),
    "manifest": ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight"),
}


def edit_json(file: Path, **values: Any) -> None:
    """Set values of a JSON object in a file; None takes one out."""
    changed = json.loads(file.read_text()) | values
    changed = {name: value for name, value in changed.items() if value is not None}
    file.write_text(json.dumps(changed))
