"""Data, evaluation and packing of examples/pytorch. Run with: pytest -m torch."""

import contextlib
import importlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_ifp
from mlx_ifp.convert.sources.gguf import load_gguf

from ..conftest import tiny_tokenizer

torch = pytest.importorskip("torch", reason="needs the extra [torch]")
pytest.importorskip("accelerate", reason="needs examples/pytorch/requirements.txt")
pytest.importorskip("gguf", reason="needs examples/pytorch/requirements.txt")
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "pytorch"
sys.path.insert(0, str(FOLDER))

import gguf_model  # noqa: E402
import slots  # noqa: E402
import transformers  # noqa: E402
from data import load_examples  # noqa: E402
from evaluate import greedy_answers  # noqa: E402
from generation import Completion, Generator, Request  # noqa: E402
from model import MaskedLM, Predictor, first_layers, load_llm  # noqa: E402
from pack_model import pack_codes, unpack_codes  # noqa: E402
from rounding import quantize  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from save import save_checkpoint  # noqa: E402
from user_turn import Template  # noqa: E402

pytestmark = pytest.mark.torch

SHAPE = {"model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 256,
         "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0,
         "eos_token_id": 2}  # fmt: skip
NOUNS = ["car", "tree", "model", "path", "token", "layer", "name", "test", "file", "key"]


def make_llm(seed: int = 0) -> torch.nn.Module:
    """A tiny llama with weights far from 0."""
    torch.manual_seed(seed)
    llm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**SHAPE))
    for parameter in llm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return llm.eval()


def conversation(chance: random.Random) -> list[dict[str, str]]:
    """One of some thousand conversations that a tiny model can learn to write."""
    a, b = chance.choice(NOUNS), chance.choice(NOUNS)
    question = chance.choice(
        [f"What is the {a}?", f"Write a {a} of the {b}.", f"Name a {a}, a {b}"]
    )
    answer = chance.choice([f"The {a} is a {b}.", f"It is in the {b} and the {a}."])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """A tiny chat model that has seen a few hundred conversations."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = tiny_tokenizer()
    llm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**SHAPE))
    optimizer = torch.optim.AdamW(llm.parameters(), lr=5e-3)
    chance = random.Random(0)
    for _ in range(80):
        texts = [
            tokenizer.apply_chat_template(conversation(chance), tokenize=False) + "<|im_end|>\n"
            for _ in range(8)
        ]
        rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        llm(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    llm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_script(name: str, *args: object, fails: bool = False) -> str:
    """Run a script's ``main``; what it prints, or the one line that it ends with."""
    module = importlib.import_module(name.removesuffix(".py"))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module.main([str(arg) for arg in args])
    except SystemExit as end:
        assert fails and isinstance(end.code, str) and "\n" not in end.code, end.code
        return end.code
    assert not fails, printed.getvalue()
    return printed.getvalue()


# -- generation


def greedy(llm, prompt: list[int], tokens: int, stops: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = llm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
        eos_token_id=stops, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def complete(generator: Generator, requests: list[Request]) -> list[Completion]:
    """All requests' completions, in their order."""
    waiting, results = list(requests), []

    def take(n: int) -> list[Request]:
        taken, waiting[:] = waiting[:n], waiting[n:]
        return taken

    generator.run(take, results.extend)
    return sorted(results, key=lambda result: requests.index(result.request))


def check_greedy(llm, reference) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 5, 33, 2, 17, 64)
    prompts = [torch.randint(3, 384, (n,), generator=generator).tolist() for n in lengths]
    stops = [2, 7, 9]
    results = complete(reference(llm, stops), [Request(prompt, 40, 0.0) for prompt in prompts])
    llm.set_attn_implementation("sdpa")
    for prompt, result in zip(prompts, results, strict=True):
        expected = greedy(llm, prompt, 40, stops)
        assert result.tokens == (expected[:-1] if result.ended else expected)
        assert result.ended == (expected[-1] in stops)


def test_slots_write_what_generate_writes():
    check_greedy(make_llm(), lambda llm, stops: Generator(llm, stops, 110, slots=3))


def test_lengths_in_place_of_masks_change_nothing(monkeypatch):
    def decode(query, key, value, lengths, scale):
        """What the CUDA kernel does, row by row."""
        rows = []
        for q, k, v, n in zip(query, key, value, lengths.tolist(), strict=True):
            rows.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q[None], k[None, :, :n], v[None, :, :n], enable_gqa=True, scale=scale
                )
            )
        return torch.cat(rows).transpose(1, 2)

    def make(llm, stops):
        made = Generator(llm, stops, 110, slots=4)
        made.flash, made.bucket = True, made.length
        return made

    monkeypatch.setattr(slots, "flash_decode", decode)
    check_greedy(make_llm(1), make)


def test_the_kernel_takes_what_it_is_given():
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)

    key, value = empty(5, 640, 3, 64).transpose(1, 2), empty(5, 640, 3, 64).transpose(1, 2)
    lengths = empty(5, dtype=torch.int32)
    out = slots.flash_decode(empty(5, 9, 1, 64), key, value, lengths, 0.125)
    assert out.shape == (5, 1, 9, 64)


def test_samples_are_those_of_the_nucleus():
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 300)
    probabilities, order = torch.softmax(logits[0] / 0.8, dim=-1).sort(descending=True)
    inside = probabilities.cumsum(0) - probabilities < 0.9
    expected = torch.zeros(300)
    expected[order[inside]] = probabilities[inside] / probabilities[inside].sum()
    drawn = slots.sample(logits.expand(40_000, -1), torch.full((40_000,), 0.8), 0.9)
    seen = torch.bincount(drawn, minlength=300) / len(drawn)
    assert seen[expected == 0].sum() == 0
    assert (seen - expected).abs().sum() / 2 < 0.02
    greedy = slots.sample(logits.expand(9, -1), torch.zeros(9), 0.9)
    assert (greedy == logits.argmax()).all()


# -- what is kept


def test_what_is_kept_is_what_mlx_ifp_keeps():
    """The filters are the same file: it must be there where the package is not."""
    ours, theirs = FOLDER / "filters.py", Path(mlx_ifp.__file__).with_name("synthesis")
    assert ours.read_text() == (theirs / "filters.py").read_text()


def test_a_prompt_is_answered_as_the_template_says():
    tokenizer = tiny_tokenizer()
    template = Template(tokenizer)
    assert template.end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert template.beginnings([[]], ["Write a"]) == ["<|im_start|>user\nWrite a"]
    for messages in (
        [{"role": "user", "content": " two\nlines "}],
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    ):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert template.encode(template.questions([messages])) == [list(expected["input_ids"])]


# -- the command


def test_synthesize_writes_rows_and_goes_on(chat_model, tmp_path):
    given = write_rows(
        tmp_path / "given.jsonl",
        [
            {"messages": [{"role": "user", "content": f"Name a {n}"}], "task": "names"}
            for n in NOUNS
        ],
    )
    held_out = write_rows(
        tmp_path / "held-out.jsonl",
        [{"messages": [{"role": "user", "content": f"Name a {n}"}], "task": "names"}
         for n in NOUNS[:4]],
    )  # fmt: skip
    output, valid = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "train-valid.jsonl"
    options = ("--model", chat_model, "--output", output, "--max-answer-tokens", 24,
               "--max-given-tokens", 200)  # fmt: skip
    run_script("synthesize.py", *options, "--count", 30, "--prompts", given, "--valid-prompts",
               held_out, "--split-valid", 10)  # fmt: skip
    rows, held = read_rows(output), read_rows(valid)
    # A random model's answer to a given prompt may be refused: it may be empty.
    assert len(held) == 10 and 1 <= sum(row["source"] == "given" for row in held) <= 4
    assert sum(row["source"] == "own" for row in rows + held) == 30
    # Given prompts are answered, and what is held out is in one file only.
    asked = [row["messages"][0]["content"] for row in rows]
    assert len({f"Name a {n}" for n in NOUNS[4:]} & set(asked)) >= len(NOUNS[4:]) / 2
    assert not set(asked) & {row["messages"][0]["content"] for row in held}
    assert {row["task"] for row in rows} <= {"names", "own", "own-openings", "own-reading"}
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    assert load_examples(output, tiny_tokenizer(), tiny_tokenizer())

    before = output.read_text()
    line = run_script("synthesize.py", *options, "--count", 40, fails=True)
    assert "--resume" in line and output.read_text() == before
    with open(output, "a") as file:
        file.write('{"messages": [{"ro')  # what a killed run leaves
    run_script("synthesize.py", *options, "--count", 36, "--resume")
    assert output.read_text().startswith(before)
    assert sum(row["source"] == "own" for row in read_rows(output) + held) == 36


def test_answers_are_those_of_the_model(chat_model, tmp_path):
    prompts = [[{"role": "user", "content": f"What is the {noun}?"}] for noun in NOUNS[:3]]
    given = write_rows(tmp_path / "given.jsonl", [{"messages": each} for each in prompts])
    output = tmp_path / "train.jsonl"
    run_script("synthesize.py", "--model", chat_model, "--output", output, "--prompts", given,
               "--answer-temperature", 0, "--max-answer-tokens", 5)  # fmt: skip
    llm, tokenizer = load_llm(str(chat_model)), tiny_tokenizer()
    answers = {row["messages"][0]["content"]: row for row in read_rows(output)}
    assert len(answers) == 3
    for messages in prompts:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        expected = greedy(llm, list(ids), 5, [2])
        row = answers[messages[0]["content"]]
        text = tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert row["messages"][1]["content"] == text
        assert row.get("truncated", False) == (expected[-1] != 2)
    # Nobody is taught to stop where only the limit did.
    cut = [row for row in answers.values() if row.get("truncated")]
    examples = load_examples(output, tokenizer, tokenizer)
    assert sum(example.tokens[-1] != 2 and 2 not in example.tokens[example.offset :]
               for example in examples) >= len(cut)  # fmt: skip


def test_named_tasks(chat_model, tmp_path):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        "naming: Users want names.\nwriting:\n- Write a car of the tree.\n- Write a key\n"
    )
    output = tmp_path / "train.jsonl"
    run_script("synthesize.py", "--model", chat_model, "--output", output, "--count", 12,
               "--tasks", tasks, "--max-answer-tokens", 16)  # fmt: skip
    assert {row["task"] for row in read_rows(output)} == {"naming", "writing"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "3", "--mix", "tasks=1"], "--tasks"),
        ([], "--count"),
        (["--count", "3", "--top-p", "0"], "--top-p"),
        (["--count", "3", "--prompts", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_synthesize_refuses_in_one_line(chat_model, tmp_path, arguments, words):
    output = tmp_path / "train.jsonl"
    line = run_script("synthesize.py", "--model", chat_model, "--output", output, *arguments,
                      fails=True)  # fmt: skip
    assert words in line and not output.exists()


# -- evaluation and packing


@pytest.fixture(scope="session")
def checkpoint(chat_model, tmp_path_factory) -> Path:
    """A checkpoint of the dense model with an untrained predictor."""
    path = tmp_path_factory.mktemp("checkpoint") / "run"
    torch.manual_seed(3)
    llm = load_llm(str(chat_model))
    model = MaskedLM(llm, Predictor(first_layers(llm, 2), 3, 256), k=128)
    torch.nn.init.normal_(model.predictor.mlp[2].weight)
    save_checkpoint(path, model, tiny_tokenizer(), tiny_tokenizer(), {}, dtype=torch.float32)
    return path


def test_the_dense_model_is_like_itself(chat_model, checkpoint, tmp_path):
    chance = random.Random(5)
    rows = [{"messages": conversation(chance), "task": t} for t in ("own", "own", "names") * 4]
    data, output = write_rows(tmp_path / "valid.jsonl", rows), tmp_path / "results.json"
    questions = tmp_path / "questions.txt"
    questions.write_text("# two\nWhat is the key?\nName a tree, a car\n")
    out = run_script(
        "evaluate.py", "--dense", chat_model, "--model", checkpoint, "--data", data, "--keep", 64,
        256, "--questions", questions, "--max-answer-tokens", 8, "--output", output,
    )  # fmt: skip
    assert "| prompt | 256 | 0.000 |" in out
    results = json.loads(output.read_text())
    whole, part = results["runs"]["prompt"]["256"], results["runs"]["prompt"]["64"]
    assert whole["agreement"] == 1 and abs(whole["val_kl"]) < 1e-6
    assert part["val_kl"] > 0.01 and part["own_kl"] is not None
    for answer in results["answers"]:
        assert answer["prompt 256"] == answer["dense"]
    line = run_script("evaluate.py", "--dense", chat_model, "--model", checkpoint, "--data", data,
                      "--keep", 64, "--output", output, fails=True)  # fmt: skip
    assert "exists" in line


def test_answers_at_each_k_are_those_of_its_own_mask(chat_model, checkpoint):
    from save import load_checkpoint

    model, tokenizer, own, _ = load_checkpoint(checkpoint)
    questions = ["What is the key?", "Name a tree, a car"]
    together = greedy_answers(model, tokenizer, own, questions, [64, 128], 8)
    for k, answers in zip((64, 128), together, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            assert greedy_answers(model, tokenizer, own, [question], [k], 8) == [[answer]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_survive_packing(bits):
    codes = torch.randint(0, 2**bits, (1003,), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() <= -(-1003 // 8) * bits
    assert torch.equal(unpack_codes(packed, bits, 1003), codes)


def test_a_packed_checkpoint_quantizes_as_before(checkpoint, tmp_path):
    run_script("pack_model.py", checkpoint, tmp_path / "packed", "--file-bytes", 60_000)
    files = list((tmp_path / "packed").glob("packed-*.safetensors"))
    assert len(files) > 3
    run_script("pack_model.py", "--unpack", tmp_path / "packed", tmp_path / "again")
    old, new = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "again"))
    assert old.keys() == new.keys()
    for name in old:
        assert old[name].shape == new[name].shape and old[name].dtype == new[name].dtype
        if old[name].ndim == 1:
            assert torch.equal(old[name], new[name])
            continue
        rows = [x.T.contiguous() if "down_proj" in name else x for x in (old[name], new[name])]
        for a, b in zip(*(quantize(x, 4, 64) for x in rows), strict=True):
            assert torch.equal(a, b), name
    old, new = (load_file(p / "predictor.safetensors") for p in (checkpoint, tmp_path / "again"))
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    # The embedding that the LLM has, too, is the LLM's again.
    assert changed == ["extractor.embed_tokens.weight"]
    names = {path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert names == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    files[0].unlink()
    line = run_script("pack_model.py", "--unpack", tmp_path / "packed", tmp_path / "no", fails=True)
    assert "missing" in line and not (tmp_path / "no").exists()


def test_a_gguf_file_is_read_as_mlx_ifp_reads_it(smollm2_gguf, tmp_path):
    out = gguf_model.convert(smollm2_gguf, tmp_path / "dense")
    ours, tokenizer = load_file(out / "model.safetensors"), load_gguf(smollm2_gguf).tokenizer
    theirs = load_gguf(smollm2_gguf, with_tokenizer=False).weights
    for name in ("model.layers.3.self_attn.k_proj", "model.layers.7.mlp.down_proj",
                 "model.layers.29.self_attn.q_proj", "model.norm"):  # fmt: skip
        array = theirs[f"{name}.weight"]
        if f"{name}.scales" in theirs:
            parts = (theirs[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            array = mx.dequantize(array, *parts, group_size=32, bits=4)
        assert np.array_equal(np.array(array.astype(mx.float32)), ours[f"{name}.weight"].numpy())
    assert len(ours) == len([name for name in theirs if name.endswith(".weight")])
    made = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("12345 6.78", " a  b\n\n c\t", "ünï 你好 🎉", "<|im_start|>user\nx<|im_end|>",
                 "don't 'LL", "\r\n\r\n x", "x=1\n    y = 2\n"):  # fmt: skip
        assert made.encode(text) == tokenizer.encode(text)
        assert made.decode(made.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}]
    assert made.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    with pytest.raises(SystemExit, match="exists"):
        gguf_model.convert(smollm2_gguf, out)


# -- all of it


@pytest.mark.slow
def test_the_default_model_in_one_command(chat_model, tmp_path):
    chance = random.Random(2)
    given = write_rows(
        tmp_path / "given.jsonl",
        [{"messages": conversation(chance), "task": task} for task in ("names", "words") * 12],
    )
    output = tmp_path / "results"
    script = [FOLDER / "default_model.sh", "--minutes", 2, "--tiny", "--model", chat_model,
              "--prompts", given, "--output", output]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", *map(str, script)], capture_output=True, text=True, env=os.environ | env
    )
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    assert "FAILED" not in out and "| prompt | 64 |" in out
    timing = json.loads((output / "timing.json").read_text())
    assert timing["stages"]["synthesize"]["tokens_per_second"] > 0
    assert timing["stages"]["train"]["trained_tokens"] > 0
    # The parts are all of it.
    subprocess.run(
        f"cat part-* | tar xz -C {tmp_path}", shell=True, check=True, cwd=output / "parts"
    )
    run_script("pack_model.py", "--unpack", tmp_path / "packed", tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "ifpruning_config.json").exists()
    line = run_script("default_model.py", "--output", output, fails=True)
    assert "not empty" in line
