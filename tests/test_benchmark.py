"""``mlx_ifp.benchmark``. What it measures is never asserted on: machines differ."""

import json
from statistics import median

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import load
from mlx_ifp.benchmark import FIRST, FULL, REPEAT, ROWS, SAME_SIZE, Settings, benchmark
from mlx_ifp.convert import convert
from mlx_ifp.same_size import memory_of, same_size_model

from .conftest import make_dense, run_command
from .helpers import random_selection, relative_error

TOKENS = mx.array([[5, 77, 130, 9, 42, 200, 301, 17]])
FEW = ("-p", 12, "-g", 12, "-n", 2)


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """The command's output and its JSON."""
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    done = run_command("benchmark", "--model", tiny_checkpoint, *FEW, "--json", file)
    assert done.returncode == 0, done.stderr
    return done, json.loads(file.read_text())


def test_table_has_a_line_for_each_network(run):
    lines = run[0].stdout.splitlines()
    header = next(line for line in lines if line.startswith("network "))
    for column in ("selection s", "loading s", "prefill s", "first token s", "decode tokens/s"):
        assert column in header
    for row in ROWS:
        cells = next(line for line in lines if line.startswith(row))[len(row) :].split()
        assert len(cells) == 7
        assert ("-" in cells) == (row in (SAME_SIZE, FULL))
    assert "k = 64 of 160 channels in 3 layers" in run[0].stdout
    assert "sub-network / same size" in run[0].stdout


def test_json_has_every_trial_and_its_summary(run):
    result = run[1]
    assert result["settings"] == {
        "prompt_tokens": 12,
        "generation_tokens": 12,
        "num_trials": 2,
        "prefill_step_size": 2048,
        "seed": 0,
    }
    assert len(result["trials"]) == 2
    # The order rotates.
    assert [next(iter(trial)) for trial in result["trials"]] == [FIRST, REPEAT]
    for row in ROWS:
        values = [trial[row]["decode_tps"] for trial in result["trials"]]
        figure = result["rows"][row]["decode_tps"]
        assert (figure["min"], figure["max"]) == (min(values), max(values))
        assert figure["min"] <= figure["median"] <= figure["max"]
        for one in (*(trial[row] for trial in result["trials"]), result["warm_up"][row]):
            parts = one["select_seconds"] + one["load_seconds"] + one["prefill_seconds"]
            assert one["first_token_seconds"] == pytest.approx(parts)
            # The first token is not decoded; the others are, in turns of eight.
            assert len(one["turn_seconds"]) == 2
            assert one["decode_tps"] == pytest.approx(11 / sum(one["turn_seconds"]))
    ratios = [
        median(t[SAME_SIZE]["turn_seconds"][i] / t[REPEAT]["turn_seconds"][i] for i in range(2))
        for t in result["trials"]
    ]
    assert result["decode_to_same_size"]["min"] == pytest.approx(min(ratios))


def test_only_a_first_prompt_selects_and_reads(run):
    # float32: k = 64 channels of 3 rows of 64 in 3 layers.
    channels = 4 * 64 * 3 * 64 * 3
    for trial in run[1]["trials"]:
        assert (trial[FIRST]["source"], trial[FIRST]["bytes_read"]) == ("activations", channels)
        assert (trial[REPEAT]["source"], trial[REPEAT]["bytes_read"]) == ("memory", 0)
        for row in (SAME_SIZE, FULL):
            assert trial[row]["bytes_read"] == trial[row]["select_seconds"] == 0


def test_memory_is_of_one_network_at_a_time(run):
    rows = run[1]["rows"]
    for row in rows.values():
        assert row["peak_memory_bytes"] > row["weights_bytes"]
    assert (
        rows[FULL]["weights_bytes"] - rows[REPEAT]["weights_bytes"] == 4 * (160 - 64) * 3 * 64 * 3
    )
    assert rows[SAME_SIZE]["weights_bytes"] == rows[REPEAT]["weights_bytes"]
    # The full model is not counted in what the others need.
    assert rows[SAME_SIZE]["peak_memory_bytes"] < rows[FULL]["peak_memory_bytes"]


def test_selections_on_disk_are_not_touched(tiny_checkpoint, tmp_path):
    cache = tmp_path / "selections"
    done = run_command("benchmark", "--model", tiny_checkpoint, *FEW, "--cache-dir", cache)
    assert done.returncode == 0, done.stderr
    assert not cache.exists()


def test_a_predictor_is_measured_too(predictor_checkpoint, tmp_path):
    file = tmp_path / "figures.json"
    done = run_command(
        "benchmark", "--model", predictor_checkpoint, *FEW, "--json", file, "--task", "Sort lists."
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert (result["task"], result["network"]["selector"]) == ("Sort lists.", "predictor")
    assert {trial[FIRST]["source"] for trial in result["trials"]} == {"predictor"}


def test_a_static_selection_is_said_to_be_made_once(tmp_path):
    (tmp_path / "prompts.txt").write_text("Sort a list.\nName a river.\n")
    checkpoint = convert(
        str(make_dense(tmp_path / "dense")),
        tmp_path / "ifp",
        keep=64,
        static_prompts=tmp_path / "prompts.txt",
    )
    model, _ = load(checkpoint, selector="static", cache=False)
    stream = mx.default_stream(mx.default_device())
    result = benchmark(model, settings=Settings(4, 12, 1))
    assert result["warm_up"][FIRST]["source"] == "static"
    assert result["trials"][0][FIRST]["source"] == "memory"
    assert result["trials"][0][FIRST]["bytes_read"] > 0
    assert any("same for every text" in note for note in result["notes"])
    assert mx.default_stream(mx.default_device()) == stream


def layers_of(network):
    """The classes of the modules that hold no other module."""
    return {
        f"{type(module).__module__}.{type(module).__name__}"
        for module in network.modules()
        if not tree_flatten(module.children(), is_leaf=lambda m: hasattr(m, "parameters"))
    }


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("k", [64, [50, 64, 160]], ids=["one-k", "k-by-layer"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "granite"])
def test_same_size_model_is_the_same_function(tmp_path, architecture, k, soft):
    dense = make_dense(tmp_path / "dense", architecture)
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    network = model.subnetwork(random_selection(3, 160, k, soft=soft))
    stock, notes = same_size_model(network, model.checkpoint.ffns)
    assert relative_error(stock(TOKENS), network(TOKENS)) < 1e-5
    assert all(name.startswith("mlx.nn.") for name in layers_of(stock)), layers_of(stock)
    assert memory_of(stock) == memory_of(network)
    assert notes == []
    mine, its = (dict(tree_flatten(n.parameters())) for n in (stock, network))
    for name in mine:
        assert (mine[name] is its[name]) == ("down_proj.weight" not in name), name


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_same_size_model_of_a_quantized_checkpoint_is_stock(tmp_path, mode):
    dense = make_dense(tmp_path / "dense")
    how = {"quantize_weights": True, "q_mode": mode, "q_group_size": 32}
    if mode == "affine":
        how["q_bits"] = 8
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64, **how), cache=False)
    network = model.subnetwork(random_selection(3, 160, 64, soft=True))
    stock, notes = same_size_model(network, model.checkpoint.ffns)
    assert notes == []
    down = stock.layers[0].mlp.down_proj
    assert type(down).__module__ == "mlx.nn.layers.quantized"
    assert (down.group_size, down.mode) == (32, mode)
    assert all(name.startswith("mlx.nn.") for name in layers_of(stock)), layers_of(stock)
    # Up to quantizing again, along the other axis.
    assert relative_error(stock(TOKENS), network(TOKENS)) < (0.05 if mode == "affine" else 1)


def test_a_width_that_groups_do_not_divide_is_said(tmp_path):
    dense = make_dense(tmp_path / "dense")
    checkpoint = convert(
        str(dense), tmp_path / "ifp", keep=50, quantize_weights=True, q_group_size=32
    )
    model, _ = load(checkpoint, cache=False)
    network = model.subnetwork(random_selection(3, 160, 50))
    stock, notes = same_size_model(network, model.checkpoint.ffns)
    assert relative_error(stock(TOKENS), network(TOKENS)) < 2e-5
    assert len(notes) == 1
    done = run_command("benchmark", "--model", checkpoint, *FEW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == notes[0]
    assert "k = 50" in notes[0]


def test_an_embedding_that_is_looked_up_is_not_read_for_each_token(tmp_path):
    dense = make_dense(tmp_path / "dense", tie_word_embeddings=False)
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    memory = memory_of(model.dense())
    assert memory["weights_bytes"] - memory["bytes_per_token"] == 4 * 384 * 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-n", 0), "--num-trials must be at least 1"),
        (("--prompt-tokens", 0), "--prompt-tokens must be at least 1"),
        (("-g", 1), "--generation-tokens must be at least 2"),
        (("--prefill-step-size", -1), "--prefill-step-size must be at least 1"),
        (("--task", " "), "empty"),
        (("--json", "nowhere/figures.json"), "nowhere"),
        (("--keep", 161), "d_ffn = 160"),
    ],
)
def test_bad_values_are_one_line(tiny_checkpoint, tmp_path, arguments, words):
    done = run_command("benchmark", "--model", tiny_checkpoint, *FEW, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.json")) == []


def test_help_has_examples():
    done = run_command("benchmark", "-h")
    assert done.returncode == 0
    assert "examples:" in done.stdout
