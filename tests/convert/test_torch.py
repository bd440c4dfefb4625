"""Converted checkpoints against PyTorch and transformers themselves. Run with: pytest -m torch."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp import load
from mlx_ifp.convert import convert

from ..conftest import tiny_tokenizer

torch = pytest.importorskip("torch", reason="needs the extra [torch]")

from .. import torch_reference as ref  # noqa: E402

pytestmark = pytest.mark.torch

K = 31
PROMPTS = [[5, 77, 130, 9, 42, 200, 301, 17], [300], list(range(3, 370, 7))]


def relative(ours, theirs) -> float:
    """Largest difference over the largest magnitude."""
    ours, theirs = np.array(ours.astype(mx.float32)), theirs.numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check(out: Path, llm, predictor, k: int, *, soft: bool, prompts=PROMPTS, logits=1e-4) -> None:
    """Scores, selected sets, soft values, masked and dense logits of a checkpoint equal PyTorch's.

    PyTorch gets the prompts in one right-padded batch, we one by one without padding.
    """
    model, _ = load(out, cache=False)
    expected = ref.scores_of(predictor, prompts)
    for ids, theirs in zip(prompts, expected, strict=True):
        assert relative(model.scores(ids), theirs) < 1e-5
        selection = model.select(ids)
        mask = ref.make_mask(theirs, k, soft)
        assert (selection.mask == (mask > 0).numpy()).all()
        assert (selection.soft_values is not None) == soft
        if soft:
            values = torch.stack([row[row > 0] for row in mask])
            assert np.abs(np.array(selection.weights) - values.numpy()).max() < 1e-5
        network = model.subnetwork(selection)
        assert relative(network(mx.array([ids]))[0], ref.logits_of(llm, ids, mask)) < logits
        assert relative(model.dense()(mx.array([ids]))[0], ref.logits_of(llm, ids)) < logits


@pytest.fixture
def tokenizer(tmp_path) -> str:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("method", ["soft", "st", "none"])
def test_split(tmp_path, tokenizer, architecture, method):
    llm = ref.make_llm(architecture)
    predictor = ref.predictor_for(llm, "split")
    source = ref.save_split(tmp_path / "run", llm, predictor, K, method)
    out = convert(str(source), tmp_path / "ifp", tokenizer=tokenizer, predictor_tokenizer=tokenizer)
    k = llm.config.intermediate_size if method == "none" else K
    check(out, llm, predictor, k, soft=method == "soft")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".safetensors"])
def test_module(tmp_path, tied, suffix):
    module, predictor = ref.module_of(ref.make_llm(tie_word_embeddings=tied), tied)
    file = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        ref.save_tensors(module.state_dict(), file)
    else:
        torch.save(module.state_dict(), file)
    out = convert_module(file, tmp_path, module)
    check(out, module.llm, predictor, K, soft=False)


def convert_module(file: Path, tmp_path: Path, module, **options) -> Path:
    configs = ref.save_configs(tmp_path / "configs", module)
    return convert(
        str(file),
        tmp_path / "ifp",
        llm_config=str(configs / "llm"),
        predictor_config=str(configs / "backbone" / "config.json"),
        tokenizer=str(configs / "tokenizer"),
        predictor_tokenizer=str(configs / "tokenizer"),
        **{"keep": K} | options,
    )


@pytest.mark.parametrize(
    ("architecture", "backbone"),
    [
        ("gemma3", "qwen3"),
        ("gemma3_text", "gemma3_text"),
        ("gemma4", "llama"),
        ("gemma4_text", "qwen2"),
        ("qwen3_5", "qwen3_5_text"),
        ("qwen3_5_text", "llama"),
        ("qwen3", "gemma4_text"),
        ("mistral", "granite"),
        ("smollm3", "glm4"),
        ("phi3", "olmo2"),
        ("gemma2", "phi3"),
    ],
)
def test_manifest(tmp_path, architecture, backbone):
    llm = ref.make_llm(architecture)
    predictor = ref.predictor_for(llm, "manifest", backbone)
    source = ref.save_manifest(tmp_path / "run", llm, predictor, K)
    out = convert(str(source), tmp_path / "ifp")
    check(out, llm, predictor, K, soft=False)
    skipped = json.loads((out / "source_tensors.json").read_text())["skipped"]["LLM"]
    assert bool(skipped) == (architecture in ref.VISION)


@pytest.mark.parametrize("rope", ["default", "llama3", "linear"])
def test_rotary_embeddings_as_transformers_writes_them(tmp_path, tokenizer, rope):
    scaling = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }[rope]
    parameters = {"rope_type": rope, "rope_theta": 300000.0} | scaling
    llm = ref.make_llm("llama", rope_parameters=parameters)
    source = ref.save_split(tmp_path / "run", llm, predictor := ref.predictor_for(llm, "split"), K)
    out = convert(str(source), tmp_path / "ifp", tokenizer=tokenizer, predictor_tokenizer=tokenizer)
    check(out, llm, predictor, K, soft=True, prompts=[*PROMPTS, list(range(1, 200))])


def test_a_prompt_of_3000_tokens(tmp_path):
    llm = ref.make_llm("qwen3")
    predictor = ref.predictor_for(llm, "manifest", "qwen2")
    source = ref.save_manifest(tmp_path / "run", llm, predictor, K)
    long = [(7 * i * i + i) % 384 for i in range(3000)]
    check(
        convert(str(source), tmp_path / "ifp"), llm, predictor, K, soft=False, prompts=[[9], long]
    )


@pytest.mark.parametrize("k", [1, 31, 74, 75])
def test_ties_go_to_the_lower_index(tmp_path, k):
    """Half of the channels score the same: the reference keeps the first of them."""
    module, predictor = ref.module_of(ref.make_llm(), tied=True)
    two = module.sparsity_predictor.prediction_head2
    with torch.no_grad():
        two.weight[::2] = 0
        two.bias[::2] = 0.25
    torch.save(module.state_dict(), tmp_path / "model.pt")
    out = convert_module(tmp_path / "model.pt", tmp_path, module, keep=k)
    check(out, module.llm, predictor, k, soft=False)


@pytest.mark.parametrize("types", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("legacy", [False, True])
def test_half_precision_is_kept_bit_by_bit(tmp_path, tokenizer, types, legacy):
    llm = ref.make_llm()
    predictor = ref.predictor_for(llm, "split")
    half = torch.bfloat16 if types == "mixed" else getattr(torch, types)
    to_type(llm, half)
    to_type(predictor.backbone, torch.float16 if types == "mixed" else half)
    if types != "mixed":
        to_type(predictor.head, half)
    source = ref.save_split(tmp_path / "run", llm, predictor, K, legacy=legacy)
    out = convert(str(source), tmp_path / "ifp", tokenizer=tokenizer, predictor_tokenizer=tokenizer)
    stored = {file: mx.load(str(out / f"{file}.safetensors")) for file in FILES}
    down = stored["channels"]["model.layers.1.mlp.down_proj.weight"]
    expected = llm.model.layers[1].mlp.down_proj.weight.detach().T.float().numpy()
    assert str(down.dtype) == f"mlx.core.{str(half).removeprefix('torch.')}"
    assert (np.array(down.astype(mx.float32)) == expected).all()
    head = stored["predictor/head"]["linear2.weight"]
    assert head.dtype == (mx.float32 if types == "mixed" else down.dtype)
    # Both sides compute in float32 from what is stored.
    to_type(llm, torch.float32), to_type(predictor, torch.float32)
    check(out, llm, predictor, K, soft=True)


def to_type(model, dtype) -> None:
    """As transformers loads half precision: the rotary frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


FILES = ("model", "channels", "predictor/model", "predictor/head")


def test_shards_and_a_wrapped_state_dict(tmp_path):
    module, predictor = ref.module_of(ref.make_llm(), tied=False)
    run = tmp_path / "run"
    run.mkdir()
    state = {f"model.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    state |= {"optimizer.exp_avg": torch.zeros(3), "step": torch.tensor(7)}
    names = sorted(state)
    weight_map = {}
    for i in range(3):
        part = {name: state[name] for name in names[i::3]}
        torch.save(part, run / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    (run / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = convert_module(run, tmp_path, module)
    check(out, module.llm, predictor, K, soft=False)
    skipped = json.loads((out / "source_tensors.json").read_text())["skipped"]
    assert set(skipped["others"]) == {"optimizer.exp_avg", "step"}
    assert list(skipped["backbone"]) == ["lm_head.weight"]


def test_a_distributed_checkpoint(tmp_path):
    import torch.distributed.checkpoint as dcp

    module, predictor = ref.module_of(ref.make_llm(), tied=True)
    state = {"model": module.state_dict(), "lr": 1e-3}
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    out = convert_module(tmp_path / "run", tmp_path, module)
    check(out, module.llm, predictor, K, soft=False)


def test_a_sharded_llm_and_a_transposed_view(tmp_path, tokenizer):
    llm = ref.make_llm()
    predictor = ref.predictor_for(llm, "split")
    source = ref.save_split(tmp_path / "run", llm, predictor, K)
    llm.save_pretrained(source / "llama", max_shard_size="60KB")
    assert len(list((source / "llama").glob("model-*.safetensors"))) > 2
    (source / "llama" / "model.safetensors").unlink(missing_ok=True)
    head = {name: t.T.contiguous().T for name, t in predictor.head.state_dict().items()}
    torch.save(head, source / "mask_head.pt")
    out = convert(str(source), tmp_path / "ifp", tokenizer=tokenizer, predictor_tokenizer=tokenizer)
    check(out, llm, predictor, K, soft=True)


def test_after_8_bit_quantization(tmp_path, tokenizer):
    """Bounds of 8 bits in groups of 32; an unquantized predictor still selects the same."""
    llm = ref.make_llm(hidden_size=64, head_dim=16)
    predictor = ref.predictor_for(llm, "split", hidden_size=64, head_dim=16)
    source = ref.save_split(tmp_path / "run", llm, predictor, K)
    common = {"tokenizer": tokenizer, "predictor_tokenizer": tokenizer}
    common |= {"quantize_weights": True, "q_bits": 8, "q_group_size": 32}
    out = convert(str(source), tmp_path / "exact", predictor_q_bits=0, **common)
    check(out, llm, predictor, K, soft=True, logits=0.05)
    model, _ = load(convert(str(source), tmp_path / "both", **common), cache=False)
    for ids, theirs in zip(PROMPTS, ref.scores_of(predictor, PROMPTS), strict=True):
        assert relative(model.scores(ids), theirs) < 0.05
        same = model.select(ids).mask & (ref.make_mask(theirs, K, False) > 0).numpy()
        assert same.sum() / (same.shape[0] * K) > 0.95


def test_the_reference_in_bfloat16_selects_nearly_the_same(tmp_path, tokenizer):
    """A trainer may run in bfloat16; its rounding is not repeated, so scores agree to that."""
    llm = ref.make_llm().to(torch.bfloat16)
    predictor = ref.predictor_for(llm, "split").to(torch.bfloat16)
    source = ref.save_split(tmp_path / "run", llm, predictor, K)
    out = convert(str(source), tmp_path / "ifp", tokenizer=tokenizer, predictor_tokenizer=tokenizer)
    model, _ = load(out, cache=False)
    for ids, theirs in zip(PROMPTS, ref.scores_of(predictor, PROMPTS), strict=True):
        assert relative(model.scores(ids), theirs.float()) < 0.05
        same = model.select(ids).mask & (ref.make_mask(theirs.float(), K, False) > 0).numpy()
        assert same.sum() / (same.shape[0] * K) > 0.9
