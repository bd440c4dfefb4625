"""Tokenizers of GGUF files: they do what their origins do."""

import io
import json
import re
from pathlib import Path

import pytest
import sentencepiece
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_ifp.convert.sources.gguf import load_gguf
from mlx_ifp.convert.sources.gguf_tokenizer import build_tokenizer, special_ids
from mlx_ifp.errors import IFPError

UNICODE = [
    "Hello, world! It's I'LL",
    "  two  spaces\n\n\ttabs \r\n end ",
    "naïve café, e\u0301, 日本語 한국어 עברית",
    "🎉👩‍👩‍👧 x²½ ٣٤ 12345",
    "",
]


def assert_survives_saving(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = load_tokenizer(folder)
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for text in [*UNICODE, "".join(special), " ".join(special)]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
        streamed = again.detokenizer
        for number in ids:
            streamed.add_token(number)
        streamed.finalize()
        assert streamed.text.lstrip(" ") == again.decode(ids).lstrip(" ")
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map


# --- a real file


@pytest.fixture(scope="module")
def real(smollm2_gguf) -> PreTrainedTokenizerFast:
    return load_gguf(smollm2_gguf).tokenizer


def test_digits_are_split(real):
    ids = real.encode("In 1984")
    assert real.convert_ids_to_tokens(ids) == ["In", "Ġ", "1", "9", "8", "4"]


def test_special_tokens_are_one_id_wherever_they_stand(real):
    special = real.added_tokens_decoder
    assert len(special) == 17
    for number, token in special.items():
        assert token.special
        assert real.encode(token.content) == [number]
        assert number in real.encode(f"a{token.content}b")
    ids = real.encode("<|im_start|>Hi<|im_end|>")
    assert real.decode(ids, skip_special_tokens=True) == "Hi"
    assert real.bos_token_id == 1
    assert real.eos_token_id == real.pad_token_id == 2
    assert real.unk_token_id == 0


@pytest.mark.parametrize("text", UNICODE)
def test_decoding_restores_the_text(real, text):
    assert real.decode(real.encode(text)) == text


def test_the_real_tokenizer_survives_saving(real, tmp_path):
    assert_survives_saving(real, tmp_path)


def test_the_chat_template_is_the_files(real):
    chat = [{"role": "user", "content": "Hi"}]
    text = real.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = real.encode(text)
    assert real.decode(ids) == text
    assert ids.count(1) == text.count("<|im_start|>")


# --- byte-level BPE


def bpe_metadata(**changes) -> dict:
    """A byte-level BPE tokenizer trained on this file, and what a GGUF says of it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train([__file__], trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<user>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.token_type": [3, 3] + [1] * 498 + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def build(metadata: dict, vocab_size: int = 501) -> PreTrainedTokenizerFast:
    return build_tokenizer(metadata, vocab_size, 128)


def test_byte_level_bpe_gives_the_ids_of_its_origin(tmp_path):
    metadata = bpe_metadata()
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split()) for merge in metadata["tokenizer.ggml.merges"]]
    origin = Tokenizer(models.BPE(vocab, merges))
    origin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = build(metadata)
    lines = [line for line in Path(__file__).read_text().splitlines() if "<" not in line]
    for text in [*UNICODE, *lines]:
        assert tokenizer.encode(text) == origin.encode(text).ids
    assert tokenizer.encode("a<user>") == [*origin.encode("a").ids, 500]
    assert not tokenizer.added_tokens_decoder[500].special
    assert_survives_saving(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "ĠI", "'", "LL", "Ġ12345", "!!", "ĊĊ"]),
        ("smollm", ["It", "'s", "ĠI", "'", "LL", "Ġ", "1", "2", "3", "4", "5", "!!", "ĊĊ"]),
        ("llama-bpe", ["It", "'s", "ĠI", "'LL", "Ġ", "123", "45", "!!ĊĊ"]),
        ("qwen2", ["It", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "5", "!!ĊĊ"]),
        ("tekken", ["It", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "5", "!!ĊĊ"]),
        ("default", ["It", "'", "s", "ĠI", "'", "LL", "Ġ", "123", "45", "!!", "ĊĊ"]),
    ],
)
def test_text_is_split_the_models_way(pre, pieces):
    backend = build(bpe_metadata(pre=pre)).backend_tokenizer
    found = backend.pre_tokenizer.pre_tokenize_str("It's I'LL 12345!!\n\n")
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
def test_bos_and_eos_are_added_if_the_file_says_so(tmp_path, key):
    plain = build(bpe_metadata()).encode("Hi")
    tokenizer = build(bpe_metadata(**{key: True}))
    expected = [1, *plain] if key == "add_bos_token" else [*plain, 0]
    assert tokenizer.encode("Hi") == expected
    assert tokenizer.encode("Hi", add_special_tokens=False) == plain
    assert_survives_saving(tokenizer, tmp_path)


def test_llama_3_adds_bos_unless_the_file_says_no():
    assert build(bpe_metadata(pre="llama-bpe")).encode("Hi")[0] == 1
    no = bpe_metadata(pre="llama-bpe", add_bos_token=False)
    assert build(no).encode("Hi")[0] != 1


def test_a_prefix_space_is_added_if_the_file_says_so(tmp_path):
    plain = build(bpe_metadata(pre="smollm"))
    tokenizer = build(bpe_metadata(pre="smollm", add_space_prefix=True))
    assert tokenizer.encode("Hi 12") == plain.encode(" Hi 12")
    assert tokenizer.encode(" Hi") == plain.encode(" Hi")
    assert_survives_saving(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre": "rot13"}, "'rot13'"),
        ({"pre": None}, "None"),
        ({"model": "bert"}, "'bert'"),
        ({"model": None}, "None"),
        ({"merges": ["no such", "pair s"]}, "cannot be built"),
        ({"tokens": ["a"] * 501}, "repeats"),
    ],
)
def test_unknown_tokenizers_are_refused_with_a_way_out(changes, expected):
    with pytest.raises(IFPError, match=re.escape(expected)) as caught:
        build(bpe_metadata(**changes))
    assert "--tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- SentencePiece


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def spm(request) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of Llama 2's kind, trained on this file."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_writer=file,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    processor.prefix = request.param
    return processor


def spm_metadata(spm: sentencepiece.SentencePieceProcessor) -> dict:
    kinds = {2: spm.is_unknown, 3: spm.is_control, 6: spm.is_byte}
    ids = range(spm.vocab_size())
    types = [next((kind for kind, test in kinds.items() if test(i)), 1) for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [spm.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": spm.prefix,
    }


def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece_does(spm):
    tokenizer = build(spm_metadata(spm), 600)
    lines = [line for line in Path(__file__).read_text().splitlines() if "</s>" not in line]
    for text in [*UNICODE, *lines, "a   b    c", " leading", "tab\tnew\nline"]:
        ids = tokenizer.encode(text)
        assert ids == [1, *spm.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]


def test_sentencepieces_own_special_tokens_need_no_metadata(spm):
    assert special_ids(spm_metadata(spm)) == {"unk": 0, "bos": 1, "eos": 2}
    moved = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.bos_token_id": 600}
    assert special_ids(spm_metadata(spm) | moved) == {"unk": 0, "eos": 5}


def test_a_sentencepiece_tokenizer_survives_saving(tmp_path, spm):
    assert_survives_saving(build(spm_metadata(spm), 600), tmp_path)


def test_bos_can_be_left_out(tmp_path, spm):
    off = {"tokenizer.ggml.add_bos_token": False}
    tokenizer = build(spm_metadata(spm) | off, 600)
    assert tokenizer.encode("Hi there") == spm.encode("Hi there")
    assert_survives_saving(tokenizer, tmp_path)
