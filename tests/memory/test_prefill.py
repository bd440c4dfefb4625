"""The whole model reads a prompt within a memory limit: trunk, one layer's FFN, keys and values."""

import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_ifp import IFPError, generate, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.commands.generate import main
from mlx_ifp.convert import convert
from mlx_ifp.llm.kv_cache import Generation, KVSettings
from mlx_ifp.memory.advice import advice, check
from mlx_ifp.memory.budget import Estimator, Use
from mlx_ifp.subnetwork.channels import ChannelReader

from ..conftest import make_dense
from ..helpers import memory_peak, random_selection

EIGHT = KVSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A layer's FFN is larger than all that is kept of the three."""
    path = tmp_path_factory.mktemp("prefill")
    shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 2048}
    return convert(str(make_dense(path / "dense", **shape)), path / "ifp", keep=64)


@pytest.fixture(scope="module")
def estimator(checkpoint):
    return Estimator(open_checkpoint(checkpoint), mx.float32)


def test_the_parts_of_a_prefill(estimator):
    ffn, network = estimator.network([2048, 0, 0]), estimator.network([64] * 3)
    use = Use([64] * 3, Generation(300, 4, EIGHT), networks=2, dense_prefill=True)
    budget = estimator.budget(use)
    # Keys and values are quantized after the pass: 32 numbers for each of two heads in 3 layers.
    floats = 2 * 3 * 2 * 32 * 4 * 512
    assert (budget.prefill_weights, budget.prefill_kv) == (ffn, floats) and floats > budget.kv
    assert budget.prefilling == budget.trunk + network + ffn + floats == budget.least
    pruned = replace(use, dense_prefill=False)
    assert estimator.budget(pruned).least < budget.least
    assert advice(estimator, use, budget.least - 1)[-1] == "--prefill pruned"
    with pytest.raises(IFPError, match=r"needed to read the prompt: trunk .*, a layer's FFN .*, k"):
        check(estimator, use, budget.least - 1)


def test_the_estimate_says_who_reads(checkpoint, estimator, monkeypatch, capsys):
    def table(*args):
        argv = ["mlx_ifp.generate", "--model", checkpoint, "-p", "Hello", "--estimate-only", *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}

    rows = table()
    assert f" {estimator.largest_ffn:,}" in rows["dense prefill"]
    assert "trunk, a layer's FFN, keys and values of the prompt" in rows["prefilling"]
    for other in (("--prefill", "pruned"), ("--dense",)):
        assert not {"dense prefill", "prefilling"} & set(table(*other))


def test_the_peak_is_what_was_counted(checkpoint, estimator):
    prompt = [(17 * i) % 380 for i in range(1000)]
    given = {"selection": random_selection(3, 2048, 64), "max_tokens": 4, "prefill_step_size": 25}
    use = Use([64] * 3, Generation(1000, 4, prefill_step_size=25), dense_prefill=True)
    needed = estimator.budget(use).least
    assert needed < estimator.trunk + estimator.network([2048] * 3)
    with memory_peak() as peak:
        model, tokenizer = load(checkpoint, cache=False, memory_limit=needed)
        generate(model, tokenizer, prompt, **given)
    # What a step computes in between is not counted: its activations, and the layer's inputs.
    assert 1 <= peak.nbytes / needed < 1.5


def test_networks_make_room_for_the_pass(checkpoint, estimator, monkeypatch):
    use = Use([64] * 3, Generation(20, 4), dense_prefill=True)
    limit = estimator.budget(use).least
    model, tokenizer = load(checkpoint, cache=False, memory_limit=limit)
    assert limit - estimator.trunk > 2 * estimator.network([64] * 3)
    for i in range(3):
        model.subnetwork(random_selection(3, 2048, 64, seed=i))
    assert model.networks.info.entries > 1
    held, read = [], ChannelReader.begin

    def looking(self, groups):
        held.append(model.networks.nbytes)
        return read(self, groups)

    monkeypatch.setattr(ChannelReader, "begin", looking)
    prompt = list(range(20, 40))
    generate(model, tokenizer, prompt, selection=random_selection(3, 2048, 64), max_tokens=4)
    assert held[:3] == [0, 0, 0]
