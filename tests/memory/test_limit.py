"""A memory limit: what does not fit is refused unread, and what is not needed makes room."""

import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_ifp import IFPError, generate, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.cli.flags import parse_size
from mlx_ifp.commands.cache_prompt import main as cache_prompt_main
from mlx_ifp.commands.generate import main
from mlx_ifp.convert import convert
from mlx_ifp.llm.kv_cache import Generation, KVSettings
from mlx_ifp.memory.advice import advice, check
from mlx_ifp.memory.budget import Estimator, Use
from mlx_ifp.selection.keep import per_layer
from mlx_ifp.subnetwork.channels import ChannelReader

from ..conftest import make_dense
from ..helpers import memory_peak, random_selection

TASKS = ["You write Python.", "You know geography.", "You solve equations."]


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts the bytes that are read from tensor files, in either of the two ways."""
    counted = [0]
    mx_load, read = mx.load, ChannelReader.begin

    def counting_load(*args, **kwargs):
        arrays = mx_load(*args, **kwargs)
        counted[0] += sum(array.nbytes for array in arrays.values())
        return arrays

    def counting_read(self, groups):
        reading = read(self, groups)
        arrays = reading.arrays

        def counted_arrays():
            counted[0] -= self.bytes_read
            found = arrays()
            counted[0] += self.bytes_read
            return found

        reading.arrays = counted_arrays
        return reading

    monkeypatch.setattr(mx, "load", counting_load)
    monkeypatch.setattr(ChannelReader, "begin", counting_read)
    limit = mx.set_memory_limit(1 << 40)
    yield counted
    mx.set_memory_limit(limit)


def run(monkeypatch, capsys, command, *args):
    """Exit code, stdout and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    code = 0
    try:
        command()
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def budget_of(checkpoint, generation, selector="predictor", **kwargs):
    opened = open_checkpoint(checkpoint)
    use = Use(per_layer(opened.ifp.k, len(opened.ffns)), generation, selector, 20, **kwargs)
    return Estimator(opened, mx.float32).budget(use)


@pytest.mark.parametrize("command", [main, cache_prompt_main])
def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    command, tiny_checkpoint, tmp_path, monkeypatch, capsys, bytes_read
):
    args = ["--model", tiny_checkpoint, "-p", "Hello", "--memory-limit"]
    args[:0] = ["-m", 4] if command is main else ["--prompt-cache-file", tmp_path / "p.safetensors"]
    needed = budget_of(tiny_checkpoint, Generation(20, 4), "activations").least
    code, out, err = run(monkeypatch, capsys, command, *args, needed - 1)
    assert code == 1
    assert out == ""
    assert len(err.splitlines()) == 1
    assert f"The memory limit is {needed / 1e6:.1f} MB, but {needed / 1e6:.1f} MB are" in err
    assert bytes_read == [0]
    assert list(tmp_path.glob("*.safetensors")) == []
    code, out, err = run(monkeypatch, capsys, command, *args, needed)
    assert code == 0, err
    assert bytes_read[0] > 0


def test_a_limit_below_the_trunk(tiny_checkpoint, monkeypatch, capsys, bytes_read):
    code, _, err = run(
        monkeypatch, capsys, main, "--model", tiny_checkpoint, "--memory-limit", "0.1MB"
    )
    assert code == 1
    trunk = budget_of(tiny_checkpoint, Generation(1), "activations").trunk
    assert f"0.1 MB, is below the {trunk / 1e6:.1f} MB of the trunk" in err
    assert bytes_read == [0]


def test_estimate_only(predictor_checkpoint, monkeypatch, capsys, bytes_read):
    args = ["--model", predictor_checkpoint, "-p", "Hello", "--estimate-only"]
    code, out, err = run(monkeypatch, capsys, main, *args)
    assert (code, err, bytes_read) == (0, "", [0])
    budget = budget_of(predictor_checkpoint, Generation(20, 100))
    for nbytes in (budget.trunk, budget.selector_weights, budget.network, budget.kv):
        assert f" {nbytes:,}\n" in out
    code, out, err = run(monkeypatch, capsys, main, *args, "--memory-limit", budget.least - 1)
    assert code == 1
    assert "too low" in out
    assert "It would fit with" in err
    assert bytes_read == [0]


def test_sizes_are_read_as_mlx_lm_reads_them():
    texts = ["6GB", "1.5gb", "800MB", "800 MB", "123456"]
    assert [parse_size(t) for t in texts] == [6 * 10**9, 15 * 10**8, 8 * 10**8, 8 * 10**8, 123456]
    for wrong in ("", "x", "5KiB", "-3", "0", "GB", "1.2.3GB"):
        with pytest.raises(Exception, match="is no size such as 6GB"):
            parse_size(wrong)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An FFN wide enough for several values of k; keys and values can be quantized."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    dense = make_dense(folder / "dense", intermediate_size=512, **shape)
    return Estimator(open_checkpoint(convert(str(dense), folder / "ifp", keep=448)), None)


def test_advice_fits_and_the_least_harm_comes_first(wide):
    use = Use([448] * 3, Generation(20, 4), "activations", 20, networks=3)
    budget = wide.budget(use)
    limit = budget.least - budget.network
    texts = advice(wide, use, limit)
    k = max(
        n
        for n in range(64, 448, 64)
        if 3 * wide.network([n] * 3) <= limit - budget.trunk - budget.kv
    )
    assert texts == ["--cached-tasks 2", f"--keep {k}"]
    for other in (replace(use, networks=2), replace(use, ks=[k] * 3)):
        check(wide, other, limit)
    with pytest.raises(IFPError) as error:
        check(wide, replace(use, ks=[k + 64] * 3), limit)
    with pytest.raises(IFPError) as error:
        check(wide, use, limit)
    assert str(error.value).endswith(f"It would fit with --cached-tasks 2, or --keep {k}.")


def test_quantized_keys_and_values_are_advised_where_they_suffice(wide):
    use = Use([448] * 3, Generation(2000, 100), "activations", 20)
    budget = wide.budget(use)
    texts = advice(wide, use, budget.least - budget.kv // 2)
    assert texts[0] == "--kv-bits 8 --quantized-kv-start 0"
    eight = Generation(2000, 100, kv=KVSettings(kv_bits=8, quantized_kv_start=0))
    check(wide, Use([448] * 3, eight, "activations", 20), budget.least - budget.kv // 2)
    # They are in 8 bits already.
    again = Use([448] * 3, eight, "activations", 20)
    assert not any("kv-bits" in text for text in advice(wide, again, wide.budget(again).least - 1))


def test_measures_are_joined_if_none_suffices_alone(wide):
    use = Use([448] * 3, Generation(2000, 100), "activations", 20, networks=2)
    eight = Generation(2000, 100, kv=KVSettings(kv_bits=8, quantized_kv_start=0))
    least = wide.budget(Use([128] * 3, eight, "activations", 20)).least
    texts = advice(wide, use, least)
    assert texts == ["--cached-tasks 1 --kv-bits 8 --quantized-kv-start 0 --keep 128"]
    nothing = wide.budget(Use([64] * 3, eight, "activations", 20)).least - 1
    assert advice(wide, use, nothing) == []
    with pytest.raises(IFPError, match=r"Raise the limit\.$"):
        check(wide, use, nothing)


def test_the_dense_model_and_selections_have_advice_of_their_own(wide):
    dense = Use([512] * 3, Generation(20, 4), dense=True)
    limit = wide.budget(dense).least - 1
    assert advice(wide, dense, limit)[-1] == "--keep 448 instead of --dense"
    given = Use([448] * 3, Generation(20, 4))
    assert "a selection of --keep 384" in advice(wide, given, wide.budget(given).least - 1)


def test_a_predictor_that_does_not_fit_has_an_alternative(predictor_checkpoint):
    estimator = Estimator(open_checkpoint(predictor_checkpoint), None)
    use = Use([64] * 3, Generation(20, 4), "predictor", 20)
    budget = estimator.budget(use)
    assert budget.selecting > budget.generating
    assert advice(estimator, use, budget.selecting - 1) == ["--selector activations"]
    with pytest.raises(IFPError, match=r"needed to select: .*predictor .*--selector activations"):
        check(estimator, use, budget.selecting - 1)


def answers(model, tokenizer, tasks=TASKS):
    return [generate(model, tokenizer, "Hello", task=task, max_tokens=5) for task in tasks]


def test_a_tight_budget_drops_the_predictor(predictor_checkpoint):
    free, tokenizer = load(predictor_checkpoint, cache=False)
    expected = answers(free, tokenizer)
    budget = budget_of(predictor_checkpoint, Generation(20, 5))
    tight, _ = load(predictor_checkpoint, cache=False, memory_limit=budget.total - 1)
    assert answers(tight, tokenizer) == expected
    assert tight.predictor_loads == 3
    assert tight.text_selector._predictor is None
    # A task whose selection is known needs no predictor.
    assert answers(tight, tokenizer, TASKS[-1:]) == expected[-1:]
    assert tight.predictor_loads == 3
    roomy, _ = load(predictor_checkpoint, cache=False, memory_limit=budget.total)
    assert answers(roomy, tokenizer) == expected
    assert roomy.predictor_loads == free.predictor_loads == 1


def test_sub_networks_have_what_is_left(tiny_checkpoint):
    budget = budget_of(tiny_checkpoint, Generation(20, 5), "activations")
    for fitting in (1, 2):
        limit = budget.least + fitting * budget.network - 1
        model, tokenizer = load(tiny_checkpoint, cache=False, memory_limit=limit)
        held = []
        for i in range(4):
            selection = random_selection(3, 160, 64, seed=i)
            generate(model, tokenizer, "Hello", selection=selection, max_tokens=5)
            held.append(model.networks.info.entries)
        assert max(held) == fitting
        assert model.networks.max_bytes == limit - budget.trunk - budget.kv
    # cache_bytes still bounds them.
    model, _ = load(tiny_checkpoint, cache=False, memory_limit=10**9, cache_bytes=1000)
    assert model.networks.max_bytes == 1000


def test_room_is_made_before_a_network_is_loaded(tiny_checkpoint, monkeypatch):
    budget = budget_of(tiny_checkpoint, Generation(1), "activations")
    limit = budget.least + budget.network
    model, _ = load(tiny_checkpoint, cache=False, memory_limit=limit)
    held, read = [], ChannelReader.begin

    def looking(self, groups):
        held.append(model.networks.nbytes)
        return read(self, groups)

    monkeypatch.setattr(ChannelReader, "begin", looking)
    for i in range(4):
        model.subnetwork(random_selection(3, 160, 64, seed=i))
    assert max(held) == budget.network
    # The selector needs room for its run, too.
    model.networks.shrink(0)
    model.subnetwork(random_selection(3, 160, 64))
    tight = budget.trunk + sum(model.memory.estimator.selector("activations", 20))
    assert tight <= limit
    model.memory.limit = tight
    model.scores("Hello")
    assert model.networks.nbytes == 0


def test_a_prompt_that_is_too_long_is_refused_before_it_selects(tiny_checkpoint, bytes_read):
    budget = budget_of(tiny_checkpoint, Generation(200, 50), "activations")
    model, tokenizer = load(tiny_checkpoint, cache=False, memory_limit=budget.least)
    read = bytes_read[0]
    prompt = list(range(20, 220))
    for kwargs in ({"max_tokens": 60}, {"max_tokens": 50, "dense": True}, {"keep": 128}):
        with pytest.raises(IFPError, match=r"The memory limit is .* are needed"):
            generate(model, tokenizer, prompt, **kwargs)
    with pytest.raises(IFPError, match="max_tokens"):
        generate(model, tokenizer, prompt, max_tokens=-1)
    with pytest.raises(IFPError, match="draft model"):
        generate(model, tokenizer, prompt, max_tokens=50, draft_model=model.trunk)
    with pytest.raises(IFPError, match="The memory limit"):
        model.dense()
    assert (model.selector_runs, bytes_read[0]) == (0, read)
    generate(model, tokenizer, prompt, max_tokens=50)
    assert model.selector_runs == 1


def test_the_peak_of_a_real_run(tmp_path):
    """MLX's own peak includes intermediate results: it is at most a tenth more, and not less."""
    shape = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4}
    dense = make_dense(tmp_path / "dense", intermediate_size=1024, **shape)
    checkpoint = convert(str(dense), tmp_path / "ifp", keep=768)
    needed = budget_of(checkpoint, Generation(20, 4), "activations").least
    with memory_peak() as peak:
        model, tokenizer = load(checkpoint, cache=False, memory_limit=needed)
        generate(model, tokenizer, "Hello", max_tokens=4)
    assert 1 <= peak.nbytes / needed < 1.1
