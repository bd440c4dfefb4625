"""``mlx_ifp.benchmark``. What it measures is never asserted on: machines differ."""

import json
import os
import re
import sys
from statistics import median

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.commands.benchmark.chart import chart
from mlx_ifp.commands.benchmark.command import benchmark, settings_of
from mlx_ifp.commands.benchmark.options import setup_arg_parser
from mlx_ifp.commands.benchmark.runs import (
    EXPERTS,
    FIRST,
    FULL,
    OVERLAPPING,
    REPEAT,
    ROWS,
    SAME_SIZE,
    SWITCH,
    SWITCHES,
)
from mlx_ifp.commands.benchmark.same_size import memory_of, same_size_model
from mlx_ifp.commands.benchmark.settings import Settings
from mlx_ifp.commands.benchmark.table import FIGURES, table
from mlx_ifp.convert import convert
from mlx_ifp.errors import IFPError

from ...conftest import make_dense, run_command
from ...helpers import random_selection, relative_error

TOKENS = mx.array([[5, 77, 130, 9, 42, 200, 301, 17]])


@pytest.fixture(scope="module")
def run(predictor_checkpoint, tmp_path_factory):
    """The command with all it can do: its output, its JSON, its chart."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = (
        "--cache-dir",
        folder / "selections",
        "--json",
        folder / "figures.json",
        "--chart",
        folder / "times.png",
    )
    cold = ("--cold",) if hasattr(os, "posix_fadvise") else ()
    done = run_command(
        *("benchmark", "--model", predictor_checkpoint, "-p", 5, 12, "-g", 12, "-n", 2),
        *("--samples", 3, "--task", "Sort lists.", "--other-task", "Name rivers.", *cold, *files),
    )
    assert done.returncode == 0, done.stderr
    # Selections on disk are neither read nor written.
    assert sorted(path.name for path in folder.iterdir()) == ["figures.json", "times.png"]
    return done, json.loads(files[3].read_text()), files[5].read_bytes()


def test_there_is_a_table_for_each_length(run):
    tables = run[0].stdout.split(" tokens in, 12 out, 3 samples, tokens/s of all\n")
    assert [int(text.split()[-1]) for text in tables[:-1]] == [5, 12]
    for text in tables[1:]:
        lines = text.splitlines()
        header = next(line for line in lines if line.startswith("network "))
        for _, column, _ in FIGURES:
            assert column in header
        for row in ROWS:
            cells = next(line for line in lines if line.startswith(row))[len(row) :].split()
            assert len(cells) == 8
            dashes = [i for i, cell in enumerate(cells) if cell == "-"]
            if row in SWITCHES:
                assert dashes == [2, 3, 4, 5, 6, 7]
            else:
                assert dashes == ([] if row in (FIRST, REPEAT) else [0, 1])
        for ratio in ("/ same size:", "/ full model:", "/ mixture of experts:", "/ prefill:"):
            assert sum(ratio in line for line in lines) == 1
        assert "mixture of experts: mixtral, 4 of 10 experts of 16 channels" in text
    assert "k = 64 of 160 channels in 3 layers, selector predictor" in tables[0]


def test_json_has_every_trial_and_its_summary(run):
    result = run[1]
    assert result["settings"] == {
        "prompt_tokens": [5, 12],
        "generation_tokens": 12,
        "num_trials": 2,
        "samples": 3,
        "prefill_step_size": 2048,
        "seed": 0,
    }
    assert (result["task"], result["other_task"]) == ("Sort lists.", "Name rivers.")
    for one in result["lengths"]:
        trials = [trial["rows"] for trial in one["trials"]]
        assert len(trials) == 2
        # The order rotates.
        assert [next(iter(rows)) for rows in trials] == [FIRST, REPEAT]
        for row in set(ROWS) - set(SWITCHES):
            values = [rows[row]["decode_tps"] for rows in trials]
            figure = one["rows"][row]["decode_tps"]
            assert (figure["min"], figure["max"]) == (min(values), max(values))
            assert figure["min"] <= figure["median"] <= figure["max"]
            for each in (*(rows[row] for rows in trials), one["warm_up"][row]):
                parts = each["select_seconds"] + each["load_seconds"] + each["prefill_seconds"]
                assert each["first_token_seconds"] == pytest.approx(parts)
                # The first token is not decoded; the others are, in turns of eight.
                assert len(each["turn_seconds"]) == 2
                assert each["decode_seconds"] == pytest.approx(sum(each["turn_seconds"]))
                assert each["decode_tps"] == pytest.approx(3 * 11 / each["decode_seconds"])
        for row in SWITCHES:
            assert all("prefill_seconds" not in rows[row] for rows in trials)


def test_ratios_are_those_of_the_trials(run):
    for one in run[1]["lengths"]:
        ratios, trials = one["ratios"], one["trials"]

        def turns(trial, row):
            return trial["rows"][row]["turn_seconds"]

        for name, row in (
            ("decode_to_same_size", SAME_SIZE),
            ("decode_to_full", FULL),
            ("decode_to_experts", EXPERTS),
        ):
            values = [
                median(turns(t, row)[i] / turns(t, REPEAT)[i] for i in range(2)) for t in trials
            ]
            assert ratios[name]["min"] == pytest.approx(min(values))
            assert ratios[name]["max"] == pytest.approx(max(values))
        rows = one["rows"]
        share = rows[FULL]["bytes_per_token"] / rows[REPEAT]["bytes_per_token"]
        assert ratios["bytes_full_to_sub_network"] == pytest.approx(share)
        assert ratios["decode_to_full_of_bytes"]["max"] == pytest.approx(
            ratios["decode_to_full"]["max"] / share
        )
        firsts = [trial["rows"][FIRST] for trial in trials]
        to_prefill = [
            (first["select_seconds"] + first["load_seconds"]) / first["prefill_seconds"]
            for first in firsts
        ]
        assert ratios["first_prompt_to_prefill"]["min"] == pytest.approx(min(to_prefill))
        to_copy = [
            first["load_seconds"] / t["copy_seconds"]
            for first, t in zip(firsts, trials, strict=True)
        ]
        assert ratios["loading_to_copy"]["max"] == pytest.approx(max(to_copy))


def test_cold_loading_is_compared_with_a_cold_read(run):
    for one in run[1]["lengths"]:
        if not hasattr(os, "posix_fadvise"):
            assert one["ratios"]["cold_loading_to_read"] is None
            continue
        values = [t["cold_load_seconds"] / t["sequential_read_seconds"] for t in one["trials"]]
        assert one["ratios"]["cold_loading_to_read"]["min"] == pytest.approx(min(values))
        assert all(-1 <= trial["still_in_memory"] <= 1 for trial in one["trials"])
        assert "loading, cold / sequential read:" in run[0].stdout


def test_the_parts_of_loading_are_said(run):
    # float32: k = 64 channels of 3 rows of 64 in 3 layers.
    wanted = 4 * 64 * 3 * 64 * 3
    for one in run[1]["lengths"]:
        for trial in one["trials"]:
            parts = trial["loading_parts"]
            assert parts["touched_bytes"] >= wanted
            assert min(parts["rows"], parts["arrays"], parts["read"]) > 0
    assert "loading, warm, parts:" in run[0].stdout


def test_only_a_new_task_selects_and_reads(run):
    # float32: k = 64 channels of 3 rows of 64 in 3 layers.
    channels = 4 * 64 * 3 * 64 * 3
    for one in run[1]["lengths"]:
        for trial in one["trials"]:
            rows = trial["rows"]
            assert (rows[FIRST]["source"], rows[FIRST]["bytes_read"]) == ("predictor", channels)
            for row in (REPEAT, SWITCH):
                assert (rows[row]["source"], rows[row]["bytes_read"]) == ("memory", 0)
            # What the first task has not, and no more.
            missing = (1 - trial["overlap"]) * channels
            assert rows[OVERLAPPING]["source"] == "predictor"
            assert 0 < trial["overlap"] < 1
            assert rows[OVERLAPPING]["bytes_read"] == round(missing)
            for row in (SAME_SIZE, FULL, EXPERTS):
                assert rows[row]["bytes_read"] == rows[row]["select_seconds"] == 0
        expected = [(1 - trial["overlap"]) * channels for trial in one["trials"]]
        assert one["overlapping_bytes_expected"]["min"] == pytest.approx(min(expected))


def test_memory_is_of_one_network_at_a_time(run, predictor_checkpoint):
    checkpoint = open_checkpoint(predictor_checkpoint)
    predictor = sum(t.nbytes for t in (*checkpoint.predictor.values(), *checkpoint.head.values()))
    for one in run[1]["lengths"]:
        rows = one["rows"]
        for row in set(ROWS) - set(SWITCHES):
            assert rows[row]["peak_memory_bytes"] > rows[row]["weights_bytes"]
        more = 4 * (160 - 64) * 3 * 64 * 3
        assert rows[FULL]["weights_bytes"] - rows[REPEAT]["weights_bytes"] == more
        assert rows[SAME_SIZE]["weights_bytes"] == rows[REPEAT]["weights_bytes"]
        # As many experts as have d_ffn channels, and what chooses among them.
        gates = 4 * 10 * 64 * 3
        assert rows[EXPERTS]["weights_bytes"] == rows[FULL]["weights_bytes"] + gates
        assert rows[EXPERTS]["bytes_per_token"] == rows[REPEAT]["bytes_per_token"] + gates
        # The full model is not counted in what the others need.
        assert rows[SAME_SIZE]["peak_memory_bytes"] < rows[FULL]["peak_memory_bytes"]
        assert one["predictor_bytes"] == predictor
        whole = rows[FIRST]["weights_bytes"] + predictor
        assert one["ratios"]["peak_to_weights"] == rows[FIRST]["peak_memory_bytes"] / whole
        assert one["ratios"]["peak_to_weights"] > 1
        # 3 samples, keys and values of 3 layers with 2 heads of 16, 256 positions at a time.
        assert one["kv_bytes"] == 4 * 3 * 2 * 3 * 2 * 16 * 256
        with_caches = rows[FIRST]["peak_memory_bytes"] / (whole + one["kv_bytes"])
        assert one["ratios"]["peak_to_weights_and_caches"] == with_caches


def test_the_chart_has_the_medians_as_bars(run):
    assert run[2].startswith(b"\x89PNG")
    axes = chart(run[1]).axes
    assert len(axes) == 2
    for panel, one in zip(axes, run[1]["lengths"], strict=True):
        bars = [bar.get_width() for container in panel.containers for bar in container]
        medians = [
            one["rows"][row].get(part, {"median": 0})["median"]
            for part in ("select_seconds", "load_seconds", "prefill_seconds", "decode_seconds")
            for row in ROWS
        ]
        assert bars == pytest.approx(medians)


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
    result = benchmark(model, settings=Settings((4,), 12, 1), experts=False)
    [one] = result["lengths"]
    assert one["warm_up"][FIRST]["source"] == "static"
    first = one["trials"][0]["rows"][FIRST]
    assert first["source"] == "memory"
    assert first["bytes_read"] > 0
    assert one["predictor_bytes"] == 0
    assert one["overlap"]["median"] == 1
    assert one["trials"][0]["rows"][OVERLAPPING]["bytes_read"] == 0
    assert EXPERTS not in one["rows"]
    assert one["ratios"]["decode_to_experts"] is None
    assert any("same for every text" in note for note in one["notes"])
    # The figures are printed without it.
    assert "mixture" not in table(one, result["settings"])
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
    assert "k = 50" in notes[0]
    result = benchmark(model, settings=Settings((4,), 2, 1), experts=False)
    assert notes[0] in table(result["lengths"][0], result["settings"]).splitlines()


def test_an_embedding_that_is_looked_up_is_not_read_for_each_token(tmp_path):
    dense = make_dense(tmp_path / "dense", tie_word_embeddings=False)
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    memory = memory_of(model.dense())
    assert memory["weights_bytes"] - memory["bytes_per_token"] == 4 * 384 * 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--task=", "--task"),
        ("--other-task=", "--other-task"),
        ("-n 0", "--num-trials must be at least 1"),
        ("-p 8 0", "--prompt-tokens must be at least 1"),
        ("-p 8 8", "twice"),
        ("-g 1", "--generation-tokens must be at least 2"),
        ("--prefill-step-size -1", "--prefill-step-size must be at least 1"),
        ("--samples 0", "--samples must be at least 1"),
        ("--json nowhere/figures.json", "figures.json cannot be written: there is no directory"),
        ("--chart nowhere/times.png", "times.png cannot be written: there is no directory nowhere"),
        ("--chart times.pdf", "--chart times.pdf: the name must end in .png"),
        ("--shapes paper --model some", "--shapes or --model, not both"),
        ("--shapes paper --scale 17", "--scale 17 leaves none of the 16 attention heads"),
        ("--shapes paper --scale 0", "--scale must be at least 1"),
        ("--shapes paper --q-bits 4", "need -q"),
        ("--shapes paper -q --q-bits 7", "--q-bits is one of"),
        ("--shapes paper -q --q-group-size 48", "--q-group-size is one of"),
        ("--scale 8", "--scale needs --shapes"),
        ("-q", "--quantize needs --shapes"),
    ],
)
def test_bad_options_are_found_before_anything_is_read(arguments, words):
    args = setup_arg_parser().parse_args(arguments.split())
    with pytest.raises(IFPError, match=re.escape(words)):
        settings_of(args)


def test_what_a_machine_lacks_is_said_first(monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with pytest.raises(IFPError, match="--cold works on Linux only"):
        settings_of(setup_arg_parser().parse_args(["--cold"]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IFPError, match=re.escape("mlx_ifp[plot]")):
        settings_of(setup_arg_parser().parse_args(["--chart", "times.png"]))


def test_a_bad_value_is_one_line(tiny_checkpoint):
    done = run_command("benchmark", "--model", tiny_checkpoint, "--keep", 161)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "d_ffn = 160" in done.stderr


def test_help_has_examples():
    assert "examples:" in setup_arg_parser().format_help()
