"""The estimate, made from headers and configs, equals what is in memory later."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.config import MaskConfig
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.weights import load_trunk
from mlx_ifp.convert import convert
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.kv_cache import Generation, KVSettings, kv_bytes
from mlx_ifp.llm.modules import find_body, get_module
from mlx_ifp.memory.budget import Estimator, Use
from mlx_ifp.memory.table import table
from mlx_ifp.selectors.predictor import load_predictor

from ..checkpoint.test_predictor_format import quantize_head, share_embedding
from ..conftest import ARCHITECTURES, make_dense, make_predictor_checkpoint
from ..helpers import memory_peak, random_selection

FLOAT = {}
FOUR_BITS = {"quantize_weights": True, "q_bits": 4, "q_group_size": 32}
# Fused FFNs, FFNs with biases and untied output layers are among these.
CASES = [
    *((a, FLOAT) for a in ("llama", "qwen3", "gemma3_text", "granite", "phi3", "glm4")),
    *((architecture, FOUR_BITS) for architecture in ("llama", "phi3", "granite", "gemma3_text")),
    ("llama", {"quantize_weights": True, "q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32}),
]


def arrays_of(tree, leave_out=()):
    """Each array counts once, by its identity."""
    return {
        id(array): array
        for name, array in tree_flatten(tree)
        if isinstance(array, mx.array) and not name.startswith(leave_out)
    }


def nbytes(arrays):
    return sum(array.nbytes for array in arrays.values())


def resident(checkpoint, dtype, selection):
    """Bytes of trunk and sub-network, added up over the loaded arrays."""
    model, _ = load(checkpoint, dtype=dtype, cache=False)
    opened = model.checkpoint
    ffns = tuple(f"{ffn.path}." for ffn in opened.ffns)
    trunk = arrays_of(model.trunk, ffns)
    for ffn in opened.ffns:
        if "down_proj" in ffn.biases:
            bias = get_module(model.trunk, ffn.path).down_proj.bias
            trunk[id(bias)] = bias
    network = arrays_of(model.subnetwork(selection))
    assert model.networks.nbytes == nbytes(network) - nbytes(trunk)
    return nbytes(trunk), nbytes({i: a for i, a in network.items() if i not in trunk})


@pytest.mark.parametrize(("architecture", "how"), CASES)
def test_trunk_and_sub_network_are_exact(architecture, how, tmp_path):
    dense = make_dense(tmp_path / "dense", architecture)
    checkpoint = convert(str(dense), tmp_path / "ifp", keep=64, **how)
    opened = open_checkpoint(checkpoint)
    k = [64, 33, 160]
    for dtype in (mx.float32, mx.bfloat16):
        estimator = Estimator(opened, dtype)
        selection = random_selection(3, 160, k)
        found = resident(checkpoint, dtype, selection)
        assert (estimator.trunk, estimator.network(k)) == found


def test_rotary_tables_count(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    dense = make_dense(tmp_path / "dense", rope_scaling=scaling)
    checkpoint = convert(str(dense), tmp_path / "ifp", keep=64)
    opened = open_checkpoint(checkpoint)
    trunk, _ = resident(checkpoint, mx.float32, random_selection(3, 160, 64))
    assert Estimator(opened, mx.float32).trunk == trunk
    assert trunk > sum(tensor.nbytes for tensor in opened.trunk.values())


def test_soft_values_that_stay_apart_count(tmp_path):
    mask = MaskConfig("sigmoid", keep_soft_values=True)
    path, _ = make_predictor_checkpoint(tmp_path / "soft", mask=mask)
    how = {"quantize_weights": True, "q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32}
    packed = convert(str(path), tmp_path / "packed", predictor_q_bits=0, **how)
    sizes = {}
    for checkpoint in (path, packed):
        estimator = Estimator(open_checkpoint(checkpoint), mx.float32)
        selection = random_selection(3, 160, 64, soft=True)
        assert estimator.network([64] * 3) == resident(checkpoint, mx.float32, selection)[1]
        sizes[checkpoint] = estimator.network([64] * 3) - estimator.network([64] * 3, dense=True)
    assert sizes == {path: 0, packed: 3 * 64 * 4}


@pytest.mark.parametrize("variant", ["plain", "shared embedding", "quantized head"])
def test_predictor_is_exact(variant, tmp_path):
    same = {"hidden_size": 64, "head_dim": 16}
    path, _ = make_predictor_checkpoint(tmp_path / "ifp", backbone=same)
    if variant == "shared embedding":
        share_embedding(path)
    if variant == "quantized head":
        quantize_head(path, {"group_size": 32, "bits": 4}, 32, 4)
    opened = open_checkpoint(path)
    for dtype in (mx.float32, mx.float16):
        trunk = load_trunk(opened, 64, dtype)
        predictor = load_predictor(opened, dtype, trunk)
        ids = arrays_of(trunk).keys()
        arrays = arrays_of(predictor.body) | arrays_of(predictor.head)
        own = {i: array for i, array in arrays.items() if i not in ids}
        assert Estimator(opened, dtype).predictor == nbytes(own)


def real_peak(model, generation, **kwargs):
    """The most bytes that a real cache has while mlx-lm generates."""
    cache = make_prompt_cache(model, generation.kv.max_kv_size)
    sizes = []

    def look(*_):
        sizes.append(sum(layer.nbytes for layer in cache if not layer.empty()))

    tokens = mx.arange(generation.prompt_tokens) % 300
    steps = generate_step(
        tokens,
        model,
        max_tokens=generation.max_tokens,
        prompt_cache=cache,
        prompt_progress_callback=look,
        prefill_step_size=generation.prefill_step_size,
        kv_bits=generation.kv.kv_bits,
        kv_group_size=generation.kv.kv_group_size,
        quantized_kv_start=generation.kv.quantized_kv_start,
    )
    for _ in steps:
        look()
    return max(sizes)


GENERATIONS = [
    Generation(1, 3),
    Generation(257, 2),
    Generation(250, 12, prefill_step_size=100),
    Generation(253, 6, kv=KVSettings(kv_bits=8, quantized_kv_start=0)),
    Generation(40, 20, kv=KVSettings(kv_bits=4, kv_group_size=32, quantized_kv_start=50)),
]


def checkpoint_of(dense, path):
    return open_checkpoint(convert(str(dense), path, keep=64))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
def test_keys_and_values_are_those_of_a_real_cache(architecture, tmp_path):
    shape = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "num_hidden_layers": 2}
    path = make_dense(tmp_path / "dense", architecture, **shape)
    model = load_model(path)[0]
    estimator = Estimator(checkpoint_of(path, tmp_path / "ifp"), None)
    for generation in GENERATIONS:
        if architecture == "gemma3_text" and generation.kv.kv_bits is not None:
            with pytest.raises(IFPError, match="RotatingKVCache Quantization NYI"):
                estimator.kv(generation)
        else:
            assert estimator.kv(generation) == real_peak(model, generation), generation


def test_a_window_is_heeded_where_mlx_lm_heeds_it(tmp_path):
    path = make_dense(tmp_path / "dense", "qwen2", num_hidden_layers=1)
    model = load_model(path)[0]
    estimator = Estimator(checkpoint_of(path, tmp_path / "ifp"), None)
    for generation in (
        Generation(40, 30, kv=KVSettings(max_kv_size=64)),
        Generation(200, 5, prefill_step_size=50, kv=KVSettings(max_kv_size=64)),
        Generation(2, 270, kv=KVSettings(max_kv_size=300)),
    ):
        assert estimator.kv(generation) == real_peak(model, generation)
    longer = Generation(2, 90_000, kv=KVSettings(max_kv_size=300))
    assert estimator.kv(longer) == 2 * 2 * 300 * 16 * 4


def test_layers_that_have_a_state_instead():
    """Qwen3.5 has a state of one size in every second layer, keys and values in the others."""
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_conv_kernel_dim": 4}
    linear |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "full_attention_interval": 2}
    rope = {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    text = ARCHITECTURES["qwen3"] | linear | {"rope_parameters": rope}
    model = build_model({"model_type": "qwen3_5", "text_config": text | {"model_type": "qwen3_5"}})
    for generation in (Generation(60, 5), Generation(254, 4, prefill_step_size=100)):
        assert kv_bytes(model, generation) == real_peak(model, generation)


def test_keys_and_values_have_the_type_that_weights_give_them(tiny_checkpoint):
    opened = open_checkpoint(tiny_checkpoint)
    full = Estimator(opened, mx.float32).kv(Generation(100))
    assert Estimator(opened, mx.bfloat16).kv(Generation(100)) * 2 == full
    # 2 (keys, values) x 3 layers x 2 heads x 256 positions x 16 x 4 bytes
    assert full == 2 * 3 * 2 * 256 * 16 * 4


def test_nothing_is_computed_on_the_way(tmp_path):
    path = make_dense(tmp_path / "dense", num_hidden_layers=2)
    model = load_model(path, lazy=True)[0]
    with memory_peak() as peak:
        assert kv_bytes(model, Generation(50_000, 10_000)) > 30_000_000
    assert peak.nbytes < 1_000_000


def test_the_selector_and_the_phases(predictor_checkpoint):
    opened = open_checkpoint(predictor_checkpoint)
    estimator = Estimator(opened, None)
    budget = estimator.budget(Use([64] * 3, Generation(10, 10), "predictor", 300, networks=2))
    backbone = load_predictor(opened).backbone
    cache = make_prompt_cache(backbone)
    get_module(backbone, find_body(backbone))(mx.zeros((1, 300), mx.int32), cache=cache)
    assert budget.selector_weights == estimator.predictor
    assert budget.selector_kv == sum(layer.nbytes for layer in cache)
    network = budget.network
    assert budget.selecting == (
        budget.trunk + network + budget.selector_weights + budget.selector_kv
    )
    assert budget.generating == budget.trunk + 2 * network + budget.kv
    assert budget.least == max(budget.selecting, budget.generating)
    assert budget.total == budget.generating + budget.selector_weights
    assert budget.keeps_predictor(budget.total)
    assert not budget.keeps_predictor(budget.total - 1)
    assert budget.fitting_networks(budget.total + network) == 3
    assert budget.fitting_networks(budget.total - 1) == 2 + estimator.predictor // network


def test_activations_hold_one_layer(tiny_checkpoint):
    opened = open_checkpoint(tiny_checkpoint)
    layer = 3 * 160 * 64
    assert Estimator(opened, None).selector("activations", 5)[0] == layer * 4
    # While it is cast, it is in memory twice.
    assert Estimator(opened, mx.float16).selector("activations", 5)[0] == layer * (4 + 2)


def test_the_table_has_the_numbers(predictor_checkpoint):
    estimator = Estimator(open_checkpoint(predictor_checkpoint), None)
    use = Use([64] * 3, Generation(10, 20, kv=KVSettings(kv_bits=8)), "predictor", 5)
    budget = estimator.budget(use)
    text = table(estimator, use, budget.least)
    for number in (budget.trunk, budget.selector_weights, budget.network, budget.kv):
        assert f" {number:,}" in text
    assert "k = 64 of 160 channels in 3 layers" in text
    assert "30 positions, 8 bits" in text
    assert "the predictor is dropped" in text
    assert "the predictor stays" in table(estimator, use, budget.total)
    assert "too low" in table(estimator, use, budget.least - 1)
