"""The PyTorch trainer of examples/pytorch against MLX's. Run with: pytest -m torch."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_ifp import load
from mlx_ifp.checkpoint.config import TextConfig
from mlx_ifp.commands.plot.training_curves import read_logs
from mlx_ifp.convert import convert
from mlx_ifp.dense_pass.prefill import dense_prefill
from mlx_ifp.selection import masks as mlx_masks
from mlx_ifp.selectors.text import selector_tokens
from mlx_ifp.tuner.batches import make_batch
from mlx_ifp.tuner.data import load_examples as mlx_examples
from mlx_ifp.tuner.predictor_start import from_checkpoint
from mlx_ifp.tuner.source import load_source
from mlx_ifp.tuner.step import Mix, batch_loss, positions_of
from mlx_ifp.tuner.student import Student

from ..conftest import tiny_tokenizer

torch = pytest.importorskip("torch", reason="needs the extra [torch]")
pytest.importorskip("accelerate", reason="needs examples/pytorch/requirements.txt")
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "pytorch"
sys.path.insert(0, str(FOLDER))

import rounding  # noqa: E402
import train  # noqa: E402
import transformers  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from data import BatchOrder, DataError, DeviceData, draw_k, load_examples  # noqa: E402
from losses import blockwise_loss, terms  # noqa: E402
from masks import mask_of, soft_topk, topk_mask  # noqa: E402
from model import MaskedLM, ModelError, Predictor, find_ffns, first_layers  # noqa: E402
from optimizer import OddSteps  # noqa: E402
from save import load_checkpoint, save_checkpoint  # noqa: E402
from validate import overlaps  # noqa: E402

pytestmark = pytest.mark.torch

L, F, K = 3, 192, 64

# Tiny models gain nothing from threads, and on a machine with other work they wait for one another.
torch.set_num_threads(1)


def make_llm(seed: int = 0, **changes) -> torch.nn.Module:
    """A tiny llama with weights far from 0."""
    shape = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": F, "num_hidden_layers": L,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
             "tie_word_embeddings": True}  # fmt: skip
    config = transformers.AutoConfig.for_model(
        **{"model_type": "llama", "bos_token_id": 0, "eos_token_id": 2} | shape | changes
    )
    llm = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in llm.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (parameter.ndim == 1))
    return llm


def make_model(**options) -> MaskedLM:
    """A tiny model whose scores differ."""
    llm = make_llm()
    torch.manual_seed(1)
    predictor = Predictor(first_layers(llm, 2), L, F)
    torch.nn.init.normal_(predictor.mlp[2].weight, std=0.3)
    return MaskedLM(llm, predictor, **{"k": K} | options)


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """Its LLM as a directory."""
    path = tmp_path_factory.mktemp("pytorch") / "dense"
    make_llm().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(*args: object) -> None:
    """``python train.py ...``, in this process: the imports take longer than a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = train.setup_arg_parser().parse_args([str(arg) for arg in args])
    train.check_options(args)
    train.Trainer(args).train()


def refused(*args: object) -> str:
    """The one line that a run ends in."""
    with pytest.raises((SystemExit, DataError, ModelError)) as caught:
        run(*args)
    return str(caught.value)


def start(*command: object, **more: str) -> subprocess.CompletedProcess:
    """A command in processes of its own, as a user runs it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def options(dense: Path, data: Path, output: Path, *more: object) -> list[object]:
    """Flags of a short run."""
    return [
        "--model", dense, "--data", data, "--output", output, "--predictor-layers", 2, "--keep",
        K, F, "--iters", 4, "--batch-tokens", 256, "--dtype", "float32", "--steps-per-report", 1,
        "--distill-weight", 0.7, "--learning-rate", 1e-3, "--warmup-iters", 1, *more,
    ]  # fmt: skip


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def losses(path: Path) -> list[float]:
    return [report["train_loss"] for report in read_log(path) if "train_loss" in report]


def as_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.detach().float().numpy())


# -- masks


@pytest.mark.parametrize("operator", ["sigmoid", "capped_exp"])
@pytest.mark.parametrize("k", [1, 64, 191, 192])
def test_soft_topk_and_its_gradient_are_mlx_ones(operator, k):
    scores = torch.randn(2, L, F, requires_grad=True)
    weights = torch.randn(2, L, F)
    soft = soft_topk(scores, k, operator, 0.1)
    (soft * weights).sum().backward()

    def value(z):
        soft = mlx_masks.soft_topk(z, k, operator=operator, temperature=0.1)
        return (soft * as_mlx(weights)).sum()

    theirs = mlx_masks.soft_topk(as_mlx(scores), k, operator=operator, temperature=0.1)
    # Where almost all are kept, the sum hardly says where nu is: 1e-5 but for k = F - 1.
    assert np.abs(soft.detach().numpy() - np.array(theirs)).max() < (1e-4 if k == F - 1 else 1e-5)
    gradient = np.array(mx.grad(value)(as_mlx(scores)))
    scale = max(np.abs(gradient).max(), 1e-3)
    assert np.abs(scores.grad.numpy() - gradient).max() < 1e-3 * scale


def test_topk_keeps_exactly_k_and_the_lower_channel_of_a_tie():
    scores = torch.tensor([[1.0, 2, 2, 2, 0], [0, 0, 0, 0, 0]])
    assert topk_mask(scores, 2).tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_straight_through_is_0_or_1_with_the_soft_gradient():
    scores = torch.randn(4, F, requires_grad=True)
    weights = torch.randn(4, F)
    gradients = []
    for mode in ("soft", "straight_through"):
        mask = mask_of(scores, K, mode=mode)
        gradients.append(torch.autograd.grad((mask * weights).sum(), scores)[0])
    assert set(mask.unique().tolist()) == {0.0, 1.0} and (mask.sum(-1) == K).all()
    assert torch.equal(*gradients)
    for mode in ("soft", "hard", "straight_through"):
        assert (mask_of(scores, F, mode=mode) == 1).all()


# -- rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_that_of_mx_quantize_bit_for_bit(bits, dtype):
    weight = 0.05 * torch.randn(64, 256)
    weight[0], weight[1], weight[2] = 0, 0.3, weight[2].abs()
    weight = weight.to(getattr(torch, dtype))
    parts = mx.quantize(as_mlx(weight).astype(getattr(mx, dtype)), 64, bits)
    theirs = mx.dequantize(*parts, group_size=64, bits=bits)
    ours = rounding.rounded(weight, bits, 64, weight.dtype)
    assert np.array_equal(ours.float().numpy(), np.array(theirs.astype(mx.float32)))
    # What unpack makes is quantized to the same; dequantized weights are not always.
    again = rounding.unpack(*rounding.pack(weight, bits, 64), bits)
    assert torch.equal(rounding.rounded(again, bits, 64, weight.dtype), ours)


def test_gradients_of_rounded_weights_reach_the_floats():
    model = make_model()
    rounds = rounding.Rounding(model.llm, find_ffns(model.llm))
    before = {name: p.clone() for name, p in model.llm.named_parameters()}
    ids = torch.randint(3, 384, (2, 9))
    with rounds:
        inside = {name: p.clone() for name, p in model.llm.named_parameters()}
        model(ids).sum().backward()
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(inside[down].T, rounding.rounded(before[down].T, 4, 64, torch.float16))
    for name, parameter in model.llm.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is not None
        assert (parameter.ndim == 1) == torch.equal(inside[name], before[name])


# -- the model


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2", "glm4", "granite", "qwen3"])
def test_models_are_found_by_structure_and_masked(kind):
    more = {"pad_token_id": 0, "head_dim": 16}
    if kind == "granite":
        more["logits_scaling"] = 2.0
    llm = make_llm(model_type=kind, **more)
    model = MaskedLM(llm)
    model.check_logits()
    ids = torch.randint(3, 384, (2, 7))
    with torch.no_grad():
        dense, whole = model(ids), model(ids, masks=torch.ones(L, F))
        half = torch.zeros(L, F)
        half[:, ::2] = 1
        narrow = model(ids, masks=half)
        for down in model.downs:
            down.weight[:, 1::2] = 0
        assert torch.equal(dense, whole) and not torch.allclose(narrow, dense, atol=1e-2)
        assert torch.allclose(narrow, model(ids), atol=1e-5)


def test_a_model_without_gated_ffns_is_refused():
    config = transformers.AutoConfig.for_model("gpt_neox", vocab_size=64, hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
    with pytest.raises(ModelError, match="gated FFNs"):
        MaskedLM(transformers.AutoModelForCausalLM.from_config(config))


def test_scores_of_a_padded_batch_are_those_of_each_text_alone():
    model = make_model()
    texts = [[5, 9, 200, 31], [77], list(range(3, 20))]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    for text, scores in zip(texts, model.scores(ids, mask), strict=True):
        assert torch.allclose(scores, model.scores(torch.tensor([text]))[0], atol=1e-5)


# -- data


def test_tokens_and_selecting_tokens_are_those_of_mlx_ifp(data):
    tokenizer = tiny_tokenizer()
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    wrapped = TokenizerWrapper(tokenizer)
    theirs = mlx_examples(str(data), wrapped, wrapped, TextConfig())["train"]
    ours = load_examples(data / "train.jsonl", tokenizer, tokenizer)
    assert [(e.tokens, e.offset, e.selecting, e.task) for e in ours] == [
        (e.tokens, e.offset, e.selecting, e.task) for e in theirs
    ]
    assert ours[0].selecting == selector_tokens(wrapped, "What is 0 + 0?", TextConfig())


def test_chunks_are_those_of_mlx_ifp(tmp_path):
    tokenizer = tiny_tokenizer()
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    wrapped = TokenizerWrapper(tokenizer)
    text = " ".join(f"word{i}" for i in range(60))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    theirs = mlx_examples(str(tmp_path), wrapped, wrapped, TextConfig(), stage="pretrain",
                          max_seq_length=64, chunk_size=16)["train"]  # fmt: skip
    ours = load_examples(tmp_path / "train.jsonl", tokenizer, tokenizer, stage="pretrain",
                         max_length=64, chunk_size=16)  # fmt: skip
    assert len(ours) > 5
    # mlx-lm ends a text with the end token.
    for one, other in zip(ours, theirs, strict=False):
        n = min(len(one.tokens), len(other.tokens))
        assert one.tokens[:n] == other.tokens[:n] and one.selecting == other.selecting
        assert one.offset == other.offset


def test_a_truncated_answer_trains_no_end_of_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "Count."},
                        {"role": "assistant", "content": "1 2 3"}]}  # fmt: skip
    rows = [row, row | {"truncated": True}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, cut = load_examples(tmp_path / "rows.jsonl", tokenizer, tokenizer)
    assert tokenizer.decode(whole.tokens[whole.offset :]) == "1 2 3<|im_end|>\n"
    assert tokenizer.decode(cut.tokens[cut.offset :]) == "1 2 3"


def test_batches_see_each_example_once_and_count_what_they_predict(data):
    examples = load_examples(data / "train.jsonl", tiny_tokenizer(), tiny_tokenizer())
    loaded = DeviceData(examples, torch.device("cpu"), block=16)
    order = BatchOrder(loaded.lengths, 256, seed=3)
    epoch = [order(i) for i in range(order.batches_per_epoch)]
    assert sorted(np.concatenate(epoch).tolist()) == list(range(len(examples)))
    again = BatchOrder(loaded.lengths, 256, seed=3)
    later = order.batches_per_epoch + 1
    assert (again(later) == order(later)).all() and (again(0) == epoch[0]).all()
    for indices in epoch:
        batch = loaded.batch(indices)
        answer, every = loaded.counts(indices)
        assert (batch.answer.sum(), batch.every.sum()) == (answer, every)
        assert batch.tokens.shape[1] % 64 == 0 and len(batch.places) % 16 == 0
        wanted = [t for i in indices for t in examples[i].tokens[1:]]
        assert batch.labels[batch.every > 0].tolist() == wanted


def test_k_is_drawn_from_the_range_and_depends_on_seed_and_step():
    drawn = [draw_k(512, 1536, step, 0) for step in range(400)]
    assert set(drawn) == set(range(512, 1537, 64))
    assert drawn == [draw_k(512, 1536, step, 0) for step in range(400)]
    assert draw_k(10, 10, 5, 0) == 10 and {draw_k(3, 5, s, 0) for s in range(50)} == {3, 4, 5}


@pytest.mark.parametrize(("row", "message"), [
    ("{", "line 1 is not JSON"),
    ('{"messages": []}', "a row has messages"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
     "the last message must be an answer"),
    ('{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}',
     "no user message"),
    ("", "no row that can be used"),
])  # fmt: skip
def test_bad_rows_are_one_line(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        load_examples(tmp_path / "rows.jsonl", tiny_tokenizer(), tiny_tokenizer())


# -- the loss


def plain_loss(model, teacher, batch, k, weight, counts):
    """The loss of a batch, written down in the plainest way."""
    masks = model.masks(model.scores(batch.selecting, batch.selecting_mask), k)
    logprobs = model(batch.tokens, masks=masks).log_softmax(-1).flatten(0, 1)[batch.places]
    wanted = teacher(batch.tokens).log_softmax(-1).flatten(0, 1)[batch.places]
    ce = -(logprobs.gather(-1, batch.labels[:, None])[:, 0] * batch.answer).sum() / counts[0]
    kl = ((wanted.exp() * (wanted - logprobs)).sum(-1) * batch.every).sum() / counts[1]
    return (1 - weight) * ce + weight * kl


@pytest.mark.parametrize("k", [K, 100, F])
def test_the_loss_at_each_k_is_that_of_this_k_alone(data, k):
    model, teacher = make_model(), MaskedLM(make_llm(5).requires_grad_(False))
    examples = load_examples(data / "train.jsonl", tiny_tokenizer(), tiny_tokenizer())
    loaded = DeviceData(examples, torch.device("cpu"), block=16)
    indices = np.array([0, 1, 5])
    batch, counts = loaded.batch(indices), loaded.counts(indices)
    step = train.Step(model, teacher, torch.float32, 16)
    loss, ce, kl = step("loss", batch, k, 0.1, 1.0, 0.3 / counts[0], 0.7 / counts[1])
    wanted = plain_loss(model, teacher, batch, k, 0.7, counts)
    assert abs(loss.item() - wanted.item()) < 1e-5
    assert abs((ce + kl - loss).item()) < 1e-6
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wanted.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, atol=1e-5), name


@pytest.mark.parametrize("operator", ["sigmoid", "capped_exp"])
def test_the_loss_is_that_of_mlx_ifp_train(tmp_path, data, operator):
    model, tokenizer = make_model(mode="soft", operator=operator), tiny_tokenizer()
    save_checkpoint(tmp_path / "run", model, tokenizer, tokenizer, {}, dtype=torch.float32)
    source = load_source(str(converted(tmp_path / "run", tmp_path / "ifp")))
    parts, ifp = from_checkpoint(source), source.checkpoint.ifp
    ifp.mask.operator, ifp.mask.temperature = operator, 0.1
    # The converter shares the embedding, which both have.
    student = Student(
        source.llm, source.ffns, parts.backbone, parts.head, ifp, embedding=parts.embedding
    )
    examples = load_examples(data / "train.jsonl", tokenizer, tokenizer)
    loaded = DeviceData(examples, torch.device("cpu"), block=64)
    indices = np.array([0, 3, 8])
    answer, every = loaded.counts(indices)
    teacher = MaskedLM(make_llm(5).requires_grad_(False))
    step = train.Step(model, teacher, torch.float32, 64)
    _, ce, kl = step("loss", loaded.batch(indices), K, 0.1, 1.0, 0.3 / answer, 0.7 / every)

    batch = make_batch(examples, indices.tolist())
    logprobs = teacher(torch.tensor(np.array(batch.tokens)).long()).log_softmax(-1)[:, :-1]
    targets = (mx.broadcast_to(mx.arange(384), logprobs.shape), as_mlx(logprobs))
    mix = Mix(0.3 / answer, 0.7 / every, 0.0, 0.1, 1.0, None)
    _, their_ce, their_kl = batch_loss(student, batch, positions_of(batch, "all"), targets, mix)
    assert abs(ce.item() - their_ce.item()) < 1e-4
    assert abs(kl.item() - their_kl.item()) < 1e-4


def test_losses_in_blocks_equal_those_in_one():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    teacher = (torch.randn(64, 8), torch.randn(30, 8))
    labels, weights = torch.randint(0, 30, (64,)), torch.rand(2, 64)
    results = []
    for block in (8, 64):
        loss, *_ = blockwise_loss(hidden, weight, torch.nn.functional.linear, teacher, labels,
                                  *weights, block=block, dtype=torch.float32)  # fmt: skip
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_overlaps_are_shared_channels_over_k():
    masks = torch.zeros(3, 1, 6, dtype=torch.bool)
    for row, channels in enumerate(([0, 1], [0, 2], [0, 1])):
        masks[row, 0, channels] = True
    report = overlaps(masks, ["a", "a", "b"])
    assert report["overlap_within"] == pytest.approx(0.5)
    assert report["overlap_between"] == pytest.approx(0.75)
    assert report["dead_channels"] == pytest.approx(0.5)


# -- checkpoints


def converted(checkpoint: Path, out: Path, **more) -> Path:
    """Through the converter."""
    return convert(
        str(checkpoint), out, predictor_config=str(checkpoint / "predictor_config"), **more
    )


def test_a_saved_checkpoint_converts_and_equals_pytorch(tmp_path):
    model, tokenizer = make_model(mode="hard"), tiny_tokenizer()
    save_checkpoint(tmp_path / "run", model, tokenizer, tokenizer, {}, dtype=torch.float32,
                    shard_size="100KB")  # fmt: skip
    again, *_ = load_checkpoint(tmp_path / "run")
    theirs, _ = load(converted(tmp_path / "run", tmp_path / "ifp"), cache=False)
    for ids in ([5, 77, 130, 9], [300], list(range(3, 200, 7))):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            scores = model.scores(tokens)
            mask = model.masks(scores)
            logits = model(tokens, masks=mask)[0]
            theirs_too = again(tokens, masks=again.masks(again.scores(tokens)))[0]
            assert torch.allclose(theirs_too, logits, atol=1e-5)
        assert np.abs(np.array(theirs.scores(ids)) - scores[0].numpy()).max() < 1e-4
        selection = theirs.select(ids)
        assert (selection.mask == (mask[0] > 0).numpy()).all()
        narrow = np.array(theirs.subnetwork(selection)(mx.array([ids]))[0])
        assert np.abs(narrow - logits.numpy()).max() < 1e-4


def test_convert_rounds_a_saved_checkpoint_to_what_was_trained(tmp_path):
    model, tokenizer = make_model(mode="hard"), tiny_tokenizer()
    save_checkpoint(tmp_path / "run", model, tokenizer, tokenizer, {}, dtype=torch.float16)
    out = converted(
        tmp_path / "run", tmp_path / "ifp", quantize_weights=True, q_bits=4, q_group_size=64
    )
    theirs, _ = load(out, cache=False, dtype=mx.float32)
    ids = list(range(3, 60))
    mask = np.zeros((L, F), bool)
    mask[:, :K] = True
    with rounding.Rounding(model.llm, find_ffns(model.llm)), torch.no_grad():
        logits = model(torch.tensor([ids]))[0].numpy()
    narrow = np.array(theirs.dense()(mx.array([ids]))[0].astype(mx.float32))
    assert np.abs(narrow - logits).max() < 2e-2 * np.abs(logits).max()


# -- prompts that the dense model reads


def own_state_model(**options) -> MaskedLM:
    """A tiny model whose predictor is a head on the LLM's own states."""
    torch.manual_seed(2)
    predictor = Predictor(None, L, F, hidden_size=64, head_width=16)
    torch.nn.init.normal_(predictor.mlp[2].weight, std=0.3)
    return MaskedLM(make_llm(), predictor, **{"k": K, "prefill": "dense"} | options)


@torch.no_grad()
def test_a_saved_own_state_converts_and_equals_pytorch(tmp_path):
    model, tokenizer = own_state_model(mode="hard"), tiny_tokenizer()
    save_checkpoint(tmp_path / "run", model, tokenizer, tokenizer, {}, dtype=torch.float32)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"predictor_config", "predictor_tokenizer"}
    theirs, wrapped = load(convert(str(tmp_path / "run"), tmp_path / "ifp"), cache=False)
    ifp = theirs.checkpoint.ifp
    assert (ifp.predictor_backbone, ifp.blend, ifp.prefill_with("predictor")) == ("llm", 0, "dense")
    question = "What is 2 + 2?"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    asked = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert selector_tokens(wrapped, question, ifp.text) == asked
    for prompt in (asked, [300], list(range(3, 200, 7))):
        answer = [17, 130, 9, 301, 5]
        tokens = torch.tensor([prompt + answer])
        scores = model.scores(torch.tensor([prompt]))
        mask = model.masks(scores)
        read = (torch.arange(tokens.shape[1]) < len(prompt))[None, :, None]
        logits = model.logits(model.hidden(tokens, mask, dense=read))[0].numpy()
        assert np.abs(np.array(theirs.scores(prompt)) - scores[0].numpy()).max() < 1e-4
        selection = theirs.select(prompt)
        assert (selection.mask == (mask[0] > 0).numpy()).all()
        prefilled = dense_prefill(theirs.parent, prompt, make_prompt_cache(theirs.trunk))
        last = np.array(prefilled.logits[0, 0])
        assert np.abs(last - logits[len(prompt) - 1]).max() < 1e-4
        network = theirs.subnetwork(selection)
        rest = np.array(network(mx.array([answer]), cache=prefilled.cache)[0])
        assert np.abs(rest - logits[len(prompt) :]).max() < 1e-4


@torch.no_grad()
def test_masks_hold_for_the_answer_alone_where_the_dense_model_reads_the_prompt():
    model = own_state_model(mode="hard")
    ids, prompt = torch.randint(3, 384, (2, 11)), 6
    masks = model.masks(model.scores(ids[:, :prompt]))
    read = (torch.arange(ids.shape[1]) < prompt)[None, :, None].expand(2, -1, 1)
    logits = model.logits(model.hidden(ids, masks, dense=read))
    # As at inference: the prompt is read first, then the answer with its keys and values.
    first = model.llm(input_ids=ids[:, :prompt], use_cache=True)
    model.set_masks(masks)
    rest = model.llm(input_ids=ids[:, prompt:], past_key_values=first.past_key_values)
    model.set_masks(None)
    assert torch.allclose(logits[:, :prompt], first.logits, atol=1e-5)
    assert torch.allclose(logits[:, prompt:], rest.logits, atol=1e-4)
    assert not torch.allclose(logits[:, prompt:], model(ids)[:, prompt:], atol=1e-2)


def test_a_head_on_the_own_state_learns_and_so_does_the_llm(data):
    """In bfloat16, too, where weights that were cast without gradients could be used again."""
    model, teacher = own_state_model(), MaskedLM(make_llm(5).requires_grad_(False))
    tokenizer = tiny_tokenizer()
    examples = load_examples(data / "train.jsonl", tokenizer, tokenizer, chat_format=True)
    assert all(e.tokens[: e.offset] == e.selecting for e in examples)
    batch = DeviceData(examples, torch.device("cpu"), block=16).batch(np.array([0, 1, 5]))
    step = train.Step(model, teacher, torch.bfloat16, 16)
    step("loss", batch, K, 0.1, 1.0, 0.0, 0.1)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_run_whose_predictor_reads_the_own_state(tmp_path, dense, data):
    flags = [flag for flag in options(dense, data, tmp_path / "run")]
    where = flags.index("--predictor-layers")
    flags[where : where + 2] = ["--predictor-llm", "--predictor-head", 16, "--prefill", "dense"]
    run(*flags, "--warm-start-iters", 20, "--quantize-from", 0.5, "--q-bits-of", "down_proj=5")
    model, _, _, manifest = load_checkpoint(tmp_path / "run")
    assert model.reads_own_state and model.prefill == "dense"
    assert manifest["quantization"]["bits_of"] == {"down_proj": 5}
    assert losses(tmp_path / "run")[-1] > 0


# -- the command


def test_a_run_and_its_log(tmp_path, dense, data):
    output = tmp_path / "run"
    flags = options(dense, data, output, "--warm-start-iters", 20, "--quantize-from", 0.5)
    run(*flags, "--grad-checkpoint", "--steps-per-eval", 2)
    reports = read_log(output)
    last = [report for report in reports if "val_loss" in report][-1]
    names = {"val_loss", "dense_loss", "val_kl", "mean_task_kl", "overlap_within", "k",
             "overlap_between", "dead_channels", "tasks", "val_time"}  # fmt: skip
    assert names <= last.keys() and set(last["tasks"]) == {"math", "poems"}
    trained = [report for report in reports if "train_loss" in report]
    assert [report["rounded"] for report in trained] == [False, False, True, True]
    assert len({report["k"] for report in trained}) > 1
    assert [log.rows["val"].keys() for log in read_logs([output])] == [{0, 2, 4}]
    model, *_ = load_checkpoint(output)
    assert model.k == 128
    assert "exists" in refused(*flags)


def test_a_run_that_begins_with_all_channels_learns(tmp_path, dense, data):
    """Then the first step has no gradients at all, and the next one's are not odd for that."""
    seed = next(seed for seed in range(99) if draw_k(K, F, 0, seed) == F)
    flags = options(dense, data, tmp_path / "run", "--distill-weight", 1, "--seed", seed)
    run(*flags, "--iters", 24, "--batch-tokens", 64)
    last = [report for report in read_log(tmp_path / "run") if "train_loss" in report][-1]
    assert last["iteration"] == 24 and last["skipped_updates"] == 0


def test_a_step_with_far_larger_gradients_than_usual_counts_for_nothing():
    weight = torch.nn.Parameter(torch.zeros(3))
    odd_steps = OddSteps(5.0, torch.device("cpu"))
    for step in range(30):
        weight.grad = torch.full((3,), 100.0 if step in (3, 25) else 1.0)
        odd_steps.usual = None if step == 10 else odd_steps.usual
        odd_steps(weight.grad.norm(), step, [weight])
        # The first steps are never skipped.
        assert bool(weight.grad.any()) == (step != 25)
    assert odd_steps.skipped == 1


def test_what_cannot_be_compiled_runs_as_it_is(tmp_path, dense, data, monkeypatch, capsys):
    failures = [RuntimeError("No working C++ compiler found")]

    def fails_once(*args):
        if failures:
            raise failures.pop()
        return terms(*args)

    monkeypatch.setattr(
        train.Step, "compile_parts", lambda step: setattr(step, "terms", fails_once)
    )
    try:
        run(*options(dense, data, tmp_path / "run", "--iters", 2, "--compile"))
    finally:
        torch.compiler.set_stance("default")
    assert "[WARNING] not compiled, which is slower" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 2


def test_a_predictor_with_a_tokenizer_of_its_own(tmp_path, dense, data):
    backbone = make_llm(3, model_type="qwen3", num_hidden_layers=2, hidden_size=32)
    backbone.save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    flags = options(dense, data, tmp_path / "run", "--predictor-model", tmp_path / "backbone")
    del flags[flags.index("--predictor-layers") : flags.index("--predictor-layers") + 2]
    run(*flags)
    ours, *_ = load_checkpoint(tmp_path / "run")
    theirs, _ = load(converted(tmp_path / "run", tmp_path / "ifp"), cache=False)
    with torch.no_grad():
        scores = ours.scores(torch.tensor([[5, 77, 130]]))[0].numpy()
    assert np.abs(np.array(theirs.scores([5, 77, 130])) - scores).max() < 1e-3


def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(tmp_path, dense, data):
    def flags(name: str, iters: int) -> list[object]:
        return [*options(dense, data, tmp_path / name, "--schedule", "constant"), "--save-every",
                2, "--iters", iters]  # fmt: skip

    run(*flags("whole", 4))
    run(*flags("cut", 2))
    run(*flags("cut", 4), "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert "its seed is 0" in refused(*flags("cut", 4), "--resume", "--seed", 7)


# accelerate divides weights among processes only on GPUs; here it is told that these are some.
FSDP = """
import sys
sys.path.insert(0, {folder!r})
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
import train
train.main()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path, dense, data, kind):
    more = ("--quantize-from", 0.5, "--q-group-size", 32)
    run(*options(dense, data, tmp_path / "one", "--grad-accumulation-steps", 2, *more))
    script, environment = FOLDER / "train.py", {}
    if kind == "fsdp2":
        script = tmp_path / "fsdp.py"
        script.write_text(FSDP.format(folder=str(FOLDER)))
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU":
                       "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                       "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}  # fmt: skip
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533", script)
    two = start(*launch, *options(dense, data, tmp_path / "two", *more), **environment)
    assert two.returncode == 0, two.stderr
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    one, other = (load_checkpoint(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def test_a_time_limit_ends_with_a_rate_near_0(tmp_path, dense, data, monkeypatch):
    # A clock that goes on by a second whenever somebody looks at it.
    clock = itertools.count(1000)
    monkeypatch.setattr(train, "START", 1000)
    fake = SimpleNamespace(time=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "time", fake)
    flags = options(dense, data, tmp_path / "run", "--minutes", 0.5)
    del flags[flags.index("--iters") : flags.index("--iters") + 2]
    run(*flags)
    trained = [report for report in read_log(tmp_path / "run") if "train_loss" in report]
    rates = [report["learning_rate"] for report in trained[2:]]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.1 * rates[0]
    assert trained[-1]["progress"] > 0.8 and trained[-1]["seconds"] <= 30


@pytest.mark.parametrize("select_by", ["task", "static"])
def test_masks_by_task_and_static_ones(tmp_path, dense, data, select_by):
    texts = tmp_path / "tasks.yaml"
    texts.write_text("math: You add numbers.\npoems: You write poems.\n")
    flags = options(dense, data, tmp_path / "run", "--select-by", select_by)
    if select_by == "static":
        del flags[flags.index("--predictor-layers") : flags.index("--predictor-layers") + 2]
        flags += ["--warm-start-iters", 1]
    else:
        flags += ["--task-descriptions", texts]
    run(*flags)
    model, *_ = load_checkpoint(tmp_path / "run")
    last = [report for report in read_log(tmp_path / "run") if "val_loss" in report][-1]
    if select_by == "static":
        assert last["overlap_between"] == pytest.approx(1)
        assert model.scores(torch.ones(2, 5)).shape == (2, L, F)
    else:
        assert last["overlap_within"] == pytest.approx(1) and last["overlap_between"] < 1


def test_the_second_stage_goes_on_from_the_first(tmp_path, dense, data):
    run(*options(dense, data, tmp_path / "one", "--stage", "pretrain", "--chunk-size", 16))
    flags = options(tmp_path / "one", data, tmp_path / "two", "--teacher", dense)
    del flags[flags.index("--predictor-layers") : flags.index("--predictor-layers") + 2]
    run(*flags)
    assert len(losses(tmp_path / "two")) == 4


@pytest.mark.parametrize(("more", "message"), [
    (["--quantize-from", 0.5, "--q-bits-of", "downproj=5"], "no weight of the model has"),
    (["--q-bits-of", "down_proj=9"], "must be NAME=BITS"),
    (["--predictor-llm"], "the predictor is one of"),
    (["--keep", 1000], "is not between 1 and the 192"),
    (["--predictor-layers", 9], "--predictor-layers must be between 1 and"),
    (["--distill-weight", 2], "--distill-weight must be from 0 to 1"),
    (["--data", "nothing.jsonl"], "cannot be read"),
    (["--select-by", "task"], "--task-descriptions go together"),
    (["--resume"], "no state to resume from"),
    (["--learning-rate", 1e30, "--schedule", "constant", "--max-grad-norm", 0], "the loss is"),
])  # fmt: skip
def test_bad_input_ends_in_one_line(tmp_path, dense, data, more, message):
    line = refused(*options(dense, data, tmp_path / "run"), *more)
    assert message in line and "\n" not in line


def test_a_command_that_fails_says_it_in_one_line(tmp_path, dense):
    result = start(FOLDER / "train.py", *options(dense, "nothing.jsonl", tmp_path / "run"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("train.py: nothing.jsonl cannot")
