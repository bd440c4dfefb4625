"""A plan says what a conversion will write, before any tensor is read or written."""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ifp.checkpoint.config import IFPConfig, TextConfig, text_limit
from mlx_ifp.checkpoint.directory import CHANNELS, TRUNK
from mlx_ifp.checkpoint.precision import Precision, quantize_config
from mlx_ifp.checkpoint.tokenizers import tokens_without_rows
from mlx_ifp.llm.ffn import FFN
from mlx_ifp.selection.keep import DEFAULT_KEEP, compact, resolve_keep

from .dense import DenseModel, dtype_of
from .naming import NamedModel
from .streams import Tensors, split_model


@dataclass
class Plan:
    """A conversion that is ready to run.

    Attributes:
        layout: the source's layout.
        config, predictor_config: mlx-lm's configs; the second is None without a predictor.
        ifp: what ``ifp_config.json`` will say.
        tensors: file stem -> name -> tensor.
        bytes_in: the bytes of the source's tensors.
        layers, d_ffn: the LLM's number of layers and of FFN channels in each.
        tokenizer, predictor_tokenizer: the tokenizers that are saved.
        extra_files, predictor_files: files that are copied as they are.
        sources: groups of source tensors -> name -> its name in mlx-lm.
        skipped: the same groups -> name -> why it is not used.
        notes: what the user should know.
    """

    layout: str
    config: dict[str, Any]
    predictor_config: dict[str, Any] | None
    ifp: IFPConfig
    tensors: dict[str, Tensors]
    bytes_in: int
    layers: int
    d_ffn: int
    tokenizer: TokenizerWrapper | None
    predictor_tokenizer: TokenizerWrapper | None = None
    extra_files: list[Path] = field(default_factory=list)
    predictor_files: list[Path] = field(default_factory=list)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(t.nbytes for group in self.tensors.values() for t in group.values())


def plan_dense(dense: DenseModel, keep: Any, precision: Precision, text_format: str | None) -> Plan:
    """Plan a dense model's conversion: it has no predictor, and k is free.

    Floats are stored in the type that the config names, as ``mlx_lm.convert`` does.

    Raises:
        IFPError: if k or the precision does not fit the model.
    """
    d_ffn = dense.ffns[0].d_ffn
    notes = note_tokens(dense.tokenizer, dense.token_rows, "the tokenizer")
    k = compact(resolve_keep(DEFAULT_KEEP if keep is None else keep, d_ffn, len(dense.ffns)))
    dtype = precision.dtype or dtype_of(dense.config)
    bytes_in = sum(tensor.nbytes for tensor in dense.tensors.values())
    precision.check()
    config, how, left = quantize_config(dense.config, dense.ffns, precision)
    trunk, channels = split_tensors(dense, dense.ffns, how, dtype)
    text = text_of(dense.config, text_format or format_of(dense.tokenizer))
    ifp = IFPConfig(k=k, text=text, source=with_versions(dense.source))
    return Plan(
        layout="dense",
        config=config,
        predictor_config=None,
        ifp=ifp,
        tensors={TRUNK: trunk, CHANNELS: channels},
        bytes_in=bytes_in,
        layers=len(dense.ffns),
        d_ffn=d_ffn,
        tokenizer=dense.tokenizer,
        extra_files=dense.extra_files,
        sources={"LLM": dense.mapped},
        skipped={"LLM": dense.skipped},
        notes=dense.notes + notes + left,
    )


def note_tokens(tokenizer: TokenizerWrapper, rows: int | None, what: str) -> list[str]:
    """Tell the user about tokens of a tokenizer that the model does not know.

    Args:
        tokenizer: the model's tokenizer.
        rows (int): the rows of the model's embedding, or None if the number is not known.
        what (str): names the tokenizer in messages, such as ``"the predictor's tokenizer"``.

    Raises:
        IFPError: if the tokenizer is another model's.
    """
    tokens = tokens_without_rows(tokenizer, rows, what)
    if not tokens:
        return []
    named = ", ".join(tokens[:8]) + (f" and {len(tokens) - 8} more" if len(tokens) > 8 else "")
    return [
        f"{what[0].upper()}{what[1:]} has tokens beyond the embedding's {rows} rows: {named}. "
        "A text with one of them has no meaning to the model."
    ]


def split_tensors(
    model: DenseModel | NamedModel, ffns: list[FFN], how: dict[str, Any], dtype: str | None
) -> tuple[Tensors, Tensors]:
    """Split a model into trunk and channels; the model lets go of its tensors."""
    trunk, channels = split_model(model.network, dict(model.tensors), ffns, how, dtype)
    model.tensors.clear()
    return trunk, channels


def format_of(tokenizer: TokenizerWrapper) -> str:
    """Without a predictor, the text that selects is tokenized as the LLM's prompts are."""
    return "chat_template" if tokenizer.has_chat_template else "raw"


def text_of(config: dict[str, Any], text_format: str) -> TextConfig:
    """How the text that selects is tokenized for a selector with this config."""
    return TextConfig(format=text_format, max_tokens=text_limit(config))


def with_versions(source: dict[str, Any]) -> dict[str, Any]:
    """Add to a source the versions of the programs that convert it, for ``ifp_config.json``."""
    return source | {"mlx_ifp": version("mlx_ifp"), "mlx_lm": version("mlx_lm")}
