"""Generation through the Python API, and mlx_ifp.generate as a user runs it."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_ifp import IFPError, generate, load, stream_generate
from mlx_ifp.checkpoint.locate import HUB_PATTERNS
from mlx_ifp.convert import convert
from mlx_ifp.selection.files import load_selection

from ..conftest import make_predictor_checkpoint, run_command
from ..helpers import mask_model, random_selection

MESSAGES = [
    {"role": "system", "content": "You are a poet."},
    {"role": "user", "content": "Name three rivers."},
    {"role": "assistant", "content": "Seine, Loire, Rhone."},
    {"role": "user", "content": "And three mountains?"},
]


@pytest.fixture
def model_and_tokenizer(predictor_checkpoint):
    return load(predictor_checkpoint, cache=False)


def greedy(model, tokenizer, prompt, n=12):
    return [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=n)]


def test_tokens_equal_those_of_the_masked_full_model(tiny_checkpoint, dense_llama):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    prompt = "Name three rivers."
    selection = model.select(prompt)
    reference = mask_model(load_model(dense_llama)[0], selection)
    steps = stream_generate(model, tokenizer, prompt, prefill="pruned", max_tokens=24)
    ours = [r.token for r in steps]
    assert ours == greedy(reference, tokenizer, prompt, 24)


def test_the_prompt_selects_unless_a_task_does(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    by_prompt = generate(model, tokenizer, "Name three rivers.", max_tokens=8)
    assert by_prompt == generate(
        model,
        tokenizer,
        "Name three rivers.",
        selection=model.select("Name three rivers."),
        max_tokens=8,
    )
    task = "You are an expert Python programmer."
    network = model.subnetwork(model.select(task))
    expected = mlx_lm.generate(network, tokenizer, "Name three rivers.", max_tokens=8)
    assert generate(model, tokenizer, "Name three rivers.", task=task, max_tokens=8) == expected
    assert model.selector_runs == 2


def test_the_first_user_message_selects_for_the_whole_conversation(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.select("Name three rivers.")
    generate(model, tokenizer, MESSAGES[:2], max_tokens=2)
    generate(model, tokenizer, MESSAGES, max_tokens=2)
    assert model.selector_runs == 1
    generate(model, tokenizer, MESSAGES, max_tokens=2, task_from="system")
    assert model.selector_runs == 2
    assert model.select("You are a poet.").digest != model.select("Name three rivers.").digest
    assert model.selector_runs == 2


def test_messages_go_through_the_chat_template(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    network = model.subnetwork(model.select("Name three rivers."))
    tokens = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = mlx_lm.generate(network, tokenizer, tokens, max_tokens=8)
    assert generate(model, tokenizer, MESSAGES, max_tokens=8) == expected


def test_token_ids_select_by_their_text(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    tokens = tokenizer.encode("Name three rivers.", add_special_tokens=False)
    model.select("Name three rivers.")
    for prompt in (tokens, mx.array(tokens)):
        generate(model, tokenizer, prompt, max_tokens=2)
    assert model.selector_runs == 1


def test_dense_is_the_whole_model(model_and_tokenizer, predictor_checkpoint):
    model, tokenizer = model_and_tokenizer
    reference = load_model(predictor_checkpoint.parent / "predictor-parts" / "llm")[0]
    ours = [r.token for r in stream_generate(model, tokenizer, "Hello", dense=True, max_tokens=12)]
    assert ours == greedy(reference, tokenizer, "Hello")
    assert model.selector_runs == 0


def test_mlx_lm_arguments_pass_through(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    banned = greedy(model.dense(), tokenizer, "Hello", 1)[0]

    def never(tokens, logits):
        return logits + mx.where(mx.arange(logits.shape[-1]) == banned, -1e9, 0)

    tokens = [
        r.token
        for r in stream_generate(
            model, tokenizer, "Hello", dense=True, max_tokens=6, logits_processors=[never]
        )
    ]
    assert tokens
    assert banned not in tokens


def test_speculative_decoding_gives_the_same_text(model_and_tokenizer):
    """A sub-network of the same trunk is a draft model like any other."""
    model, tokenizer = model_and_tokenizer
    draft = model.subnetwork(model.select("Hello", keep=32))
    plain = generate(model, tokenizer, "Hello", max_tokens=12)
    drafted = generate(
        model, tokenizer, "Hello", max_tokens=12, draft_model=draft, num_draft_tokens=2
    )
    assert drafted == plain


@pytest.mark.parametrize("selector", ["predictor", "activations"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "smollm3"])
def test_threads_share_a_model(tmp_path, selector, architecture):
    """Arrays made in one thread are used in others: none of them may be lazy."""
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp", architecture)
    model, _ = load(checkpoint, cache=False, selector=selector)
    tokens = mx.array([[1, 2, 3]])
    texts = [f"Text {i}." for i in range(4)]
    expected = {text: model.subnetwork(model.select(text))(tokens).tolist() for text in texts}
    fresh, _ = load(checkpoint, cache=False, selector=selector)

    def work(i):
        text = texts[i % 4]
        return text, fresh.prepare(text).network(tokens).tolist()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(16)))
    assert all(got == expected[text] for text, got in results)
    assert fresh.selector_runs == 4


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "4-bit"])
def test_a_batch_gives_what_each_prompt_gives(dense_llama, tmp_path, quantized):
    checkpoint = convert(str(dense_llama), tmp_path / "ifp", quantize_weights=quantized)
    model, tokenizer = load(checkpoint, cache=False)
    network = model.subnetwork(model.select("Hello"))
    prompts = [tokenizer.encode(text) for text in ("Hello", "Name three rivers in France.")]
    batch = mlx_lm.batch_generate(network, tokenizer, prompts, max_tokens=8)
    singly = [greedy(network, tokenizer, prompt, 8) for prompt in prompts]
    assert batch.texts == [tokenizer.decode(tokens) for tokens in singly]


def test_a_seed_gives_the_same_text_cached_or_not(model_and_tokenizer):
    """Making a sub-network must not move the sampler's random state."""
    model, tokenizer = model_and_tokenizer
    sampler = mlx_lm.sample_utils.make_sampler(temp=1.0)
    texts = []
    for _ in range(2):
        mx.random.seed(5)
        texts.append(generate(model, tokenizer, "Hello", max_tokens=16, sampler=sampler))
    assert texts[0] == texts[1]
    assert model.networks.info.hits >= 1


@pytest.mark.parametrize(
    "how", [{}, {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": 0}], ids=["", "8-bit"]
)
def test_a_prompt_cache_is_refused_under_another_selection(tmp_path, how):
    shape = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    model, tokenizer = load(make_predictor_checkpoint(tmp_path / "ifp", llm=shape)[0], cache=False)
    prompt_cache = make_prompt_cache(model.trunk)
    arguments = {"max_tokens": 2, "prompt_cache": prompt_cache} | how
    generate(model, tokenizer, "Hello", task="A.", **arguments)
    generate(model, tokenizer, "more", task="A.", **arguments)
    for other in ({"task": "Something quite different."}, {"dense": True}):
        with pytest.raises(IFPError, match="another selection"):
            generate(model, tokenizer, "more", max_tokens=2, prompt_cache=prompt_cache, **other)


def test_selections_of_scores_and_text_agree(model_and_tokenizer):
    model, _ = model_and_tokenizer
    scores = np.array(model.scores("Name three rivers."))
    selection = model.select("Name three rivers.")
    assert scores.shape == (3, 160)
    assert selection.indices.shape == (3, 64)
    for row, kept in zip(scores, np.array(selection.indices), strict=True):
        assert row[kept].min() >= np.delete(row, kept).max()
    mean, per_layer = selection.overlap(model.select("Write a poem."))
    assert 0 < mean < 1
    assert per_layer.shape == (3,)


def test_a_selection_of_another_model_is_refused(model_and_tokenizer):
    model, _ = model_and_tokenizer
    with pytest.raises(IFPError, match="3 layers of 99"):
        model.subnetwork(random_selection(3, 99, 50))
    with pytest.raises(IFPError, match="another checkpoint"):
        model.subnetwork(random_selection(3, 160, 50, checkpoint="x"))


# -- the command


def run(checkpoint, *args, **kwargs):
    return run_command("generate", "--model", checkpoint, *args, **kwargs)


def test_text_goes_to_stdout_and_the_rest_to_stderr(predictor_checkpoint, tmp_path):
    stats = tmp_path / "stats.json"
    done = run(predictor_checkpoint, "-p", "Hello", "-m", 8, "--stats", stats)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(predictor_checkpoint)
    expected = generate(model, tokenizer, [{"role": "user", "content": "Hello"}], max_tokens=8)
    assert done.stdout == expected + "\n"
    labels = [line.split("  ")[0] for line in done.stderr.splitlines()]
    table = ["selection", "loading", "prefill", "first token", "decode", "peak memory"]
    assert [label for label in labels if label in table] == table
    figures = json.loads(stats.read_text())
    assert figures["selection"]["source"] == "predictor"
    assert figures["load"]["bytes_read"] == 3 * 3 * 64 * 64 * 4
    assert figures["decode"]["tokens"] == 8
    assert figures["total_parameters"] - figures["active_parameters"] == 3 * 96 * 3 * 64
    parts = figures["selection"]["seconds"] + figures["load"]["seconds"]
    assert figures["first_token_seconds"] >= parts + figures["prefill"]["seconds"]
    for value in (
        figures["decode"]["tokens_per_second"],
        figures["peak_memory_bytes"],
        figures["prefill"]["seconds"],
    ):
        assert value > 0


def test_a_second_process_takes_the_selection_from_disk(predictor_checkpoint, tmp_path):
    texts, sources = [], []
    for i, extra in enumerate(([], [], ["--no-cache"])):
        stats = tmp_path / f"{i}.json"
        done = run(predictor_checkpoint, "-p", "Hello", "-m", 8, "--stats", stats, *extra)
        texts.append(done.stdout)
        sources.append(json.loads(stats.read_text())["selection"]["source"])
    assert sources == ["predictor", "disk", "predictor"]
    assert len(set(texts)) == 1


def test_quiet_prints_only_the_text(predictor_checkpoint):
    done = run(predictor_checkpoint, "-p", "Hello", "-m", 4, "--verbose", "False")
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == ""


def test_prompt_and_task_from_stdin_and_file(predictor_checkpoint, tmp_path):
    (tmp_path / "task.txt").write_text("You are a poet.")
    stats = tmp_path / "s.json"
    one = run(predictor_checkpoint, "-p", "-", "--task", "You are a poet.", "-m", 8, stdin="Hello")
    other = run(
        predictor_checkpoint, "-p", "Hello", "--task-file", tmp_path / "task.txt", "-m", 8,
        "--stats", stats,
    )  # fmt: skip
    third = run(
        predictor_checkpoint, "-p", "Hello", "--system-prompt", "You are a poet.", "--task-from",
        "system", "-m", 8, "--stats", tmp_path / "t.json",
    )  # fmt: skip
    assert one.stdout == other.stdout != ""
    assert third.returncode == 0
    for file in ("s.json", "t.json"):
        assert json.loads((tmp_path / file).read_text())["selection"]["source"] == "disk"


def test_keep_overrides_k(predictor_checkpoint, tmp_path):
    for keep, k in (("32", 32), ("0.4", 64), ("50%", 64), ("1.0", 160), ("10,20,30", None)):
        file = tmp_path / "selection"
        done = run(
            predictor_checkpoint, "-p", "Hello", "-m", 2, "--keep", keep, "--save-selection", file
        )
        assert done.returncode == 0, done.stderr
        model, _ = load(predictor_checkpoint, keep=[10, 20, 30] if k is None else k)
        assert load_selection(file).digest == model.select("Hello").digest


def test_a_saved_selection_is_used(predictor_checkpoint, tmp_path):
    file, stats = tmp_path / "selection.safetensors", tmp_path / "stats.json"
    run(predictor_checkpoint, "-p", "Hello", "--task", "Poetry.", "--save-selection", file)
    by_task = run(predictor_checkpoint, "-p", "Hello", "--task", "Poetry.", "-m", 8)
    by_file = run(
        predictor_checkpoint, "-p", "Hello", "--selection", file, "-m", 8, "--stats", stats
    )
    assert by_file.stdout == by_task.stdout
    assert json.loads(stats.read_text())["selection"]["source"] == "given"


def test_show_selection_compares_with_the_previous_task(predictor_checkpoint):
    first = run(predictor_checkpoint, "-p", "Hello", "--task", "One.", "-m", 1, "--show-selection")
    assert "0.400  -" in first.stderr
    second = run(predictor_checkpoint, "-p", "Hello", "--task", "Two.", "-m", 1, "--show-selection")
    model, _ = load(predictor_checkpoint)
    mean, per_layer = model.select("Two.").overlap(model.select("One."))
    assert f"0.400  {mean:.3f}" in second.stderr
    assert all(f"0.400  {value:.3f}" in second.stderr for value in per_layer)


def test_dense_flag(predictor_checkpoint, tmp_path):
    stats = tmp_path / "stats.json"
    done = run(predictor_checkpoint, "-p", "Hello", "--dense", "-m", 8, "--stats", stats)
    model, tokenizer = load(predictor_checkpoint)
    prompt = [{"role": "user", "content": "Hello"}]
    assert done.stdout == generate(model, tokenizer, prompt, dense=True, max_tokens=8) + "\n"
    figures = json.loads(stats.read_text())
    assert figures["selection"]["source"] == "dense"
    assert figures["active_parameters"] == figures["total_parameters"]


def test_sampling_with_a_seed_repeats(predictor_checkpoint):
    args = ("-p", "Hello", "--temp", 1.0, "--top-p", 0.9, "--seed", 3, "-m", 12)
    texts = {run(predictor_checkpoint, *args).stdout for _ in range(2)}
    assert len(texts) == 1
    assert run(predictor_checkpoint, *args[:-3], 4, *args[-2:]).stdout not in texts


def test_key_value_cache_flags(predictor_checkpoint):
    args = ("-p", "Hello", "-m", 8, "--prefill-step-size", 4)
    assert run(predictor_checkpoint, *args, "--max-kv-size", 64).returncode == 0
    done = run(predictor_checkpoint, *args, "--kv-bits", 8, "--kv-group-size", 64)
    assert done.returncode == 0


def test_a_stored_prompt_is_continued_under_its_selection_only(predictor_checkpoint, tmp_path):
    file = tmp_path / "prompt.safetensors"
    task = ("--task", "Answer questions on a text.")
    made = run_command(
        "cache_prompt", "--model", predictor_checkpoint, "-p", "The text is long.",
        "--prompt-cache-file", file, *task,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    with_cache = ("--prompt-cache-file", file, "-p", " Who wrote it?", "-m", 8)
    done = run(predictor_checkpoint, *with_cache, *task)
    assert done.returncode == 0, done.stderr
    whole = run(predictor_checkpoint, "-p", "The text is long. Who wrote it?", "-m", 8, *task)
    assert done.stdout == whole.stdout
    refused = run(predictor_checkpoint, *with_cache, "--task", "Write a poem.")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "another selection" in refused.stderr
    assert "by a sub-network, but" in run(predictor_checkpoint, *with_cache, "--dense").stderr


def test_a_checkpoint_of_the_hub(predictor_checkpoint, tmp_path):
    """As huggingface_hub keeps it after a download; the network is off."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(predictor_checkpoint, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    done = run("someone/tiny", "-p", "Hello", "-m", 4, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(predictor_checkpoint, "-p", "Hello", "-m", 4).stdout


def test_an_ordinary_model_of_the_hub_is_refused_before_its_weights_come(monkeypatch):
    def missing(*_, **__):
        raise EntryNotFoundError("404")

    monkeypatch.setattr("mlx_ifp.checkpoint.locate.hf_hub_download", missing)
    monkeypatch.setattr("mlx_ifp.checkpoint.locate.snapshot_download", None)
    with pytest.raises(IFPError, match=r"convert --model someone/dense --mlx-path"):
        load("someone/dense")


def test_all_files_of_a_checkpoint_are_downloaded(predictor_checkpoint):
    files = [path for path in predictor_checkpoint.rglob("*") if path.is_file()]
    names = [str(path.relative_to(predictor_checkpoint)) for path in files]
    assert "predictor/head.safetensors" in names
    assert list(filter_repo_objects(names, allow_patterns=HUB_PATTERNS)) == names
