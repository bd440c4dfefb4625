"""Trained checkpoints on disk, in the layout "manifest" that ``mlx_ifp.convert`` reads.

The LLM as ``save_pretrained`` writes it, and beside it ``predictor.safetensors`` (``extractor.*``
and ``mlp.*``), ``predictor_config/config.json``, ``predictor_tokenizer/`` and
``ifpruning_config.json``. A run with one mask for all has ``static_scores.safetensors`` (``scores``
[L, F]) in place of the predictor. No pickles.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from model import (
    MaskedLM,
    ModelError,
    Predictor,
    StaticScores,
    backbone_from_config,
    find_ffns,
    first_layers,
    load_backbone,
    load_llm,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

MANIFEST = "ifpruning_config.json"
PREDICTOR = "predictor.safetensors"
STATIC = "static_scores.safetensors"
CONFIG_DIRECTORY = "predictor_config"
TOKENIZER_DIRECTORY = "predictor_tokenizer"


def save_checkpoint(
    output: Path,
    model: MaskedLM,
    tokenizer: Any,
    predictor_tokenizer: Any,
    more: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
    shard_size: str = "4GB",
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint; files appear under their names when all of them are whole.

    Args:
        output (Path): the directory; made if it does not exist.
        model (MaskedLM): LLM, predictor and k.
        tokenizer, predictor_tokenizer: of transformers.
        more (dict): further fields of the manifest.
        dtype (torch.dtype): of the weights in the files. A run that trained rounded weights is
            saved in the type in which it rounded them: ``convert -q`` makes the same of them.
        shard_size (str): of the LLM's files at most, as transformers takes it.
        state (dict): the model's state dict, if its own weights are parts of it.
    """
    temporary = output / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    llm, predictor = model.llm, model.predictor
    # Tied tensors stay tied, and are written once.
    whole = model.state_dict() if state is None else state
    of_llm, of_predictor = (_below(whole, prefix) for prefix in ("llm.", "predictor."))
    stored = {tensor.data_ptr(): _stored(tensor, dtype) for tensor in of_llm.values()}
    of_llm = {name: stored[tensor.data_ptr()] for name, tensor in of_llm.items()}
    llm.save_pretrained(temporary, state_dict=of_llm, max_shard_size=shard_size)
    _set_dtype(temporary / "config.json", dtype)
    tokenizer.save_pretrained(temporary)
    manifest = {
        "num_layers": model.layers,
        "full_intermediate_dim": model.channels,
        "target_intermediate_dim": model.k,
        "mask_operator": model.operator,
        "mask_temperature": model.temperature,
        # What inference does: a mask that was trained hard is used hard.
        "keep_soft_values": model.mode == "soft",
        "softtopk_iters": 40,
        "chat_template_format": "chat" if model.reads_own_state else "raw",
        "prefill": model.prefill,
    }
    if isinstance(predictor, StaticScores):
        save_file({"scores": _stored(of_predictor["scores"], torch.float32)}, temporary / STATIC)
        manifest |= {"select_by": "static", "static_scores": STATIC}
    else:
        tensors = {name: _stored(tensor, dtype) for name, tensor in of_predictor.items()}
        save_file(tensors, temporary / PREDICTOR)
        manifest["predictor_hidden_dim"] = predictor.mlp[0].out_features
        if predictor.extractor is None:
            manifest["predictor_backbone"] = "llm"
        else:
            predictor.extractor.config.save_pretrained(temporary / CONFIG_DIRECTORY)
            _set_dtype(temporary / CONFIG_DIRECTORY / "config.json", dtype)
            predictor_tokenizer.save_pretrained(temporary / TOKENIZER_DIRECTORY)
            # A path relative to this directory.
            manifest["predictor_model"] = CONFIG_DIRECTORY
    (temporary / MANIFEST).write_text(json.dumps(manifest | more, indent=2) + "\n")
    for new in sorted(temporary.iterdir()):
        old = output / new.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(new, old)
    temporary.rmdir()


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own, as it is written."""
    tensor = tensor.detach().cpu()
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensor.contiguous().clone()


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let a ``config.json`` name the type of the weights beside it."""
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    for part in (config, config.get("text_config") or {}):
        part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def is_checkpoint(path: str | Path) -> bool:
    """Whether a directory holds a trained checkpoint, not only an LLM."""
    return (Path(path) / MANIFEST).is_file()


def load_checkpoint(
    path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[MaskedLM, Any, Any, dict[str, Any]]:
    """Read a checkpoint that :func:`save_checkpoint` wrote.

    Returns:
        tuple: the model, with the mode of inference; the LLM's tokenizer and the predictor's; the
        manifest.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        llm = load_llm(str(path), dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
        predictor_tokenizer = tokenizer
        if (path / STATIC).is_file():
            scores = load_file(path / STATIC)["scores"]
            predictor: nn.Module = StaticScores(*scores.shape)
            predictor.start_from_mean(scores)
        else:
            predictor = _load_predictor(path, manifest, llm).to(dtype)
            if predictor.extractor is not None:
                _share_embedding(llm, predictor)
                predictor_tokenizer = AutoTokenizer.from_pretrained(path / TOKENIZER_DIRECTORY)
        model = MaskedLM(
            llm,
            predictor,
            k=manifest["target_intermediate_dim"],
            operator=manifest.get("mask_operator", "sigmoid"),
            temperature=manifest["mask_temperature"],
            mode="soft" if manifest.get("keep_soft_values") else "hard",
            prefill=manifest.get("prefill", "pruned"),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is no checkpoint that can be loaded: {reason}") from error
    return model.eval(), tokenizer, predictor_tokenizer, manifest


def _load_predictor(path: Path, manifest: dict[str, Any], llm: nn.Module) -> Predictor:
    backbone = None
    if manifest.get("predictor_backbone") != "llm":
        config = path / manifest["predictor_model"] / "config.json"
        backbone = backbone_from_config(json.loads(config.read_text()))
    downs = find_ffns(llm)
    tensors = load_file(path / PREDICTOR)
    predictor = Predictor(
        backbone, len(downs), downs[0].in_features, downs[0].out_features,
        head_width=len(tensors["mlp.0.weight"]),
    )  # fmt: skip
    predictor.load_state_dict(tensors)
    return predictor


def _share_embedding(llm: nn.Module, predictor: Predictor) -> None:
    """One tensor for both where the file holds the LLM's embedding twice."""
    own, theirs = predictor.extractor.get_input_embeddings(), llm.get_input_embeddings()
    if own.weight.shape == theirs.weight.shape and torch.equal(own.weight, theirs.weight):
        predictor.extractor.set_input_embeddings(theirs)


def load_models(args: Any) -> tuple[MaskedLM, MaskedLM, Any, Any]:
    """What a run starts from: the model to train, the frozen dense one, and both tokenizers."""
    named = args.predictor_layers or args.predictor_model or args.predictor_llm
    if is_checkpoint(args.model) and not named:
        model, tokenizer, predictor_tokenizer, manifest = load_checkpoint(args.model)
        if args.select_by != "static" and manifest.get("select_by") == "static":
            raise ModelError(f"{args.model} has no predictor; name --predictor-layers")
    else:
        llm = load_llm(args.model)
        tokenizer = predictor_tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = MaskedLM(llm)
        shape = (model.layers, model.channels)
        # The width of the LLM's own states.
        hidden_size, head_width = model.downs[0].out_features, args.predictor_head
        if args.select_by == "static":
            model.predictor = StaticScores(*shape)
        elif args.predictor_model:
            backbone = load_backbone(args.predictor_model)
            model.predictor = Predictor(backbone, *shape, head_width=head_width)
            predictor_tokenizer = AutoTokenizer.from_pretrained(args.predictor_model)
        elif args.predictor_layers:
            backbone = first_layers(llm, args.predictor_layers)
            model.predictor = Predictor(backbone, *shape, head_width=head_width)
        elif args.predictor_llm:
            model.predictor = Predictor(None, *shape, hidden_size, head_width)
        else:
            raise ModelError(
                "name the predictor: --predictor-layers N, --predictor-model DIR or --predictor-llm"
            )
    model.prefill = args.prefill or model.prefill
    if model.reads_own_state and (model.prefill != "dense" or args.stage == "pretrain"):
        raise ModelError(
            "a predictor that reads the LLM's own state needs --prefill dense and --stage sft"
        )
    model.operator, model.mode = args.mask_operator, args.mask
    model.temperature = args.mask_temperature
    model.check_logits()
    # A copy, before training gives the student other weights.
    dense = load_llm(args.teacher) if args.teacher else copy.deepcopy(model.llm)
    return model, MaskedLM(dense.requires_grad_(False)), tokenizer, predictor_tokenizer
