"""Build the tokenizer of a GGUF file from the file's metadata."""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from mlx_ifp.errors import IFPError

# These are the values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


@dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE splits text before it merges: by one expression after the other."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token stays whole
    add_bos: bool = False  # used if the file does not say


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The keys are llama.cpp's names; the kinds that it splits alike share a line.
PRE_TOKENIZERS = {
    name: pre_tokenizer
    for names, pre_tokenizer in (
        ("default", PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
        ("gpt-2 phi-2 mpt olmo jais trillion exaone4", PreTokenizer((_GPT2,))),
        ("smollm starcoder refact command-r codeshell exaone", PreTokenizer((r"\p{N}", _GPT2))),
        ("llama-bpe llama3 llama-v3 falcon3 pixtral", PreTokenizer((_LLAMA3,), True, True)),
        ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
        ("qwen2 deepseek-r1-qwen megrez", PreTokenizer((_LLAMA3.replace("{1,3}", ""),))),
        ("tekken", PreTokenizer((_TEKKEN,), True, True)),
    )
    for name in names.split()
}


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Find the ids of those of bos, eos, eot, eom, unk and pad that the file names.

    An id is left out if it is missing or belongs to no token.
    """
    count = len(metadata.get("tokenizer.ggml.tokens") or ())
    # These are SentencePiece's own ids, which old files leave out.
    own = {"unk": 0, "bos": 1, "eos": 2}
    ids: dict[str, Any] = {}
    if metadata.get("tokenizer.ggml.model") == "llama":
        ids |= own
    keys = {name: name for name in ("bos", "eos", "eot", "eom")}
    for name, key in (keys | {"unk": "unknown", "pad": "padding"}).items():
        ids[name] = metadata.get(f"tokenizer.ggml.{key}_token_id", ids.get(name))
    return {name: id for name, id in ids.items() if isinstance(id, int) and 0 <= id < count}


def build_tokenizer(
    metadata: dict[str, Any], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Build the tokenizer with its chat template and special tokens.

    Args:
        metadata: the file's metadata, of which ``tokenizer.*`` is used.
        vocab_size: the rows of the embedding; there may be fewer tokens.
        max_length: the model's context, in tokens.

    Raises:
        IFPError: if its kind is not supported or its parts do not fit together. The message
            does not name the file.
    """
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind not in ("gpt2", "llama"):
        raise _refusal(f"the tokenizer {kind!r} is not supported")
    if kind == "gpt2" and (pre is None or pre not in PRE_TOKENIZERS):
        raise _refusal(f"the tokenizer's way to split text, {pre!r}, is not supported")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not len(set(tokens)) == len(tokens) == len(types) <= vocab_size:
        raise _refusal("the tokenizer repeats tokens or has more than the embedding")
    ids = special_ids(metadata)
    try:
        if kind == "gpt2" and pre is not None:
            backend, add_bos = _byte_level_bpe(metadata), PRE_TOKENIZERS[pre].add_bos
        else:
            backend, add_bos = _sentencepiece_bpe(metadata, types, ids), True
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=type_ != USER_DEFINED)
                for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
                if type_ in (UNKNOWN, CONTROL, USER_DEFINED) or i in ids.values()
            ]
        )
        named = {name: tokens[i] for name, i in ids.items()}
        first, last = (
            [named[name]] if metadata.get(f"tokenizer.ggml.add_{name}_token", add) else []
            for name, add in (("bos", add_bos and "bos" in named), ("eos", False))
        )
        if first or last:
            backend.post_processor = TemplateProcessing(
                single=[*first, "$A", *last],
                pair=[*first, "$A", *last, *first, "$B", *last],
                special_tokens=[(token, tokens.index(token)) for token in first + last],
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=max_length,
            **{f"{k}_token": named[k] for k in ("bos", "eos", "unk", "pad") if k in named},
        )
    except Exception as error:  # tokenizers raises no narrower type
        raise _refusal(f"the tokenizer cannot be built ({error!r})") from error


def _refusal(reason: str) -> IFPError:
    return IFPError(f"{reason}; give the model's own with --tokenizer PATH.")


def _byte_level_bpe(metadata: dict[str, Any]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    pre = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(text), "isolated") for text in pre.expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_space_prefix", False):
        # ByteLevel's own option does not do: after the splits, it puts a space before every piece.
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A (?=\s)"), "")]
        )
    return backend


def _sentencepiece_bpe(
    metadata: dict[str, Any], types: list[int], ids: dict[str, int]
) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    reserved = {token for token, type_ in zip(tokens, types, strict=True) if type_ != NORMAL}
    merges = generate_merges(vocab, scores, reserved | {tokens[i] for i in ids.values()})
    unknown = tokens[ids["unk"]]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    # Like llama.cpp, and unlike Metaspace, this adds the space before a text that has one too.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
