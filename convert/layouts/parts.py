"""The parts of a trained model that every layout yields, and those that a user can name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from mlx_ifp.checkpoint.config import HeadConfig, MaskConfig
from mlx_ifp.checkpoint.locate import expanded
from mlx_ifp.errors import IFPError, one_line

from ..sources.files import read_json
from ..sources.tensor import SourceTensor
from ..wrappers import state_dicts


@dataclass(frozen=True)
class Given:
    """The parts that the user names; those that the layout has itself stay None.

    Attributes:
        llm_config, predictor_config: a ``config.json``, or a directory or hub id that has one.
        tokenizer, predictor_tokenizer: a directory or hub id.
        keep: k.
    """

    llm_config: str | None = None
    predictor_config: str | None = None
    tokenizer: str | None = None
    predictor_tokenizer: str | None = None
    keep: Any = None


@dataclass
class TrainedPredictor:
    """A predictor whose tensors are not read yet.

    Attributes:
        backbone: tensors by the names that Hugging Face's classes give them; None if the head reads
            the LLM's own hidden state.
        config: Hugging Face's config of the backbone; None if the user has to name it.
        head: ``linear1.weight`` [P, D], ``linear1.bias``, ``linear2.weight`` [L * d_ffn, P], ...
        activation, feature_norm: the head's, as in ``ifp_config.json``.
        tokenizer: where it is; None if the user has to name it. With the LLM as backbone there is
            neither this nor a config, and nothing to name.
        text_format: how the text that selects is tokenized, as in ``ifp_config.json``.
    """

    backbone: dict[str, SourceTensor] | None
    config: dict[str, Any] | None
    head: dict[str, SourceTensor]
    activation: str
    feature_norm: str
    tokenizer: str | None
    text_format: str = "raw"

    @property
    def reads_own_state(self) -> bool:
        """Whether the head reads the LLM's own hidden state."""
        return self.backbone is None

    def head_config(self) -> HeadConfig:
        """Check the head's shape and return its config.

        Raises:
            IFPError: if a tensor does not fit; the message names it.
        """
        for name in ("linear1.weight", "linear2.weight"):
            if len(self.head[name].shape) != 2:
                tensor = self.head[name]
                raise IFPError(f"{tensor.path}: {tensor.name} must have two axes.")
        one, two = self.head["linear1.weight"], self.head["linear2.weight"]
        if one.shape[0] != two.shape[1]:
            raise IFPError(
                f"{two.path}: {two.name} takes {two.shape[1]} values, but {one.name} gives "
                f"{one.shape[0]}."
            )
        biases = []
        for i, weight in enumerate((one, two), 1):
            bias = self.head.get(f"linear{i}.bias")
            if bias is not None and bias.shape != weight.shape[:1]:
                raise IFPError(
                    f"{bias.path}: {bias.name} has the shape {bias.shape}, expected "
                    f"{weight.shape[:1]}."
                )
            biases.append(bias is not None)
        widths = [one.shape[1], one.shape[0], two.shape[0]]
        return HeadConfig(widths, biases, self.activation, self.feature_norm)


@dataclass
class TrainedModel:
    """A trained checkpoint whose tensors are not read yet.

    Attributes:
        layout: its name.
        llm: tensors by the names that Hugging Face's classes give them.
        llm_config: Hugging Face's config.
        predictor: what gives the scores; None if ``static`` does.
        mask: what inference does with the scores.
        keep: k.
        layers, d_ffn: what the layout says about the LLM, or None.
        tokenizer: where the LLM's tokenizer is.
        static: scores float32 [L, d_ffn] that are the same for every text.
        prefill: who read the prompts in training, ``dense`` or ``pruned``; None if it is not said.
        extra_files: files of the LLM that are copied as they are.
        others: source tensors that belong to neither, and why they are not used.
        missing: what the user has to name, as ``--flag (what it is)``.
        notes: what the user should know.
    """

    layout: str
    llm: dict[str, SourceTensor]
    llm_config: dict[str, Any] | None
    predictor: TrainedPredictor | None
    mask: MaskConfig
    keep: Any
    layers: int | None
    d_ffn: int | None
    tokenizer: str | None
    static: SourceTensor | None = None
    prefill: str | None = None
    extra_files: list[Path] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        needed = {
            "--llm-config": (self.llm_config, "the LLM's config.json"),
            "--tokenizer": (self.tokenizer, "the LLM's tokenizer"),
            "--keep": (self.keep, "k, the channels kept in each layer"),
        }
        if (own := self.predictor) is not None and not own.reads_own_state:
            needed["--predictor-config"] = (own.config, "the config.json of its backbone")
            needed["--predictor-tokenizer"] = (own.tokenizer, "the predictor's tokenizer")
        self.missing += [f"{flag} ({what})" for flag, (it, what) in needed.items() if it is None]

    @property
    def sources(self) -> list[SourceTensor]:
        """All tensors that are used."""
        groups = [self.llm]
        if self.predictor is not None:
            groups += [self.predictor.backbone or {}, self.predictor.head]
        static = [] if self.static is None else [self.static]
        return [tensor for group in groups for tensor in group.values()] + static


def read_config(name: str | None) -> dict[str, Any] | None:
    """Read a ``config.json``, given as a file or as a directory or hub id that has one."""
    if name is None:
        return None
    path = expanded(name)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        with one_line(f"{name} cannot be loaded"):
            path = Path(hf_hub_download(name, "config.json"))
    config = read_json(path)
    if "model_type" not in config and "text_config" not in config:
        raise IFPError(f"{path}: model_type is missing.")
    return config


def take_head(
    tensors: dict[str, SourceTensor], names: dict[str, str], where: str
) -> dict[str, SourceTensor]:
    """Find the head's tensors and give them our names.

    Args:
        tensors: the source's tensors, without those of the backbone.
        names: the source's names -> ours.
        where: names the file in messages.

    Raises:
        IFPError: if one is missing or left over.
    """
    # If a dict inside the file has all of the head's tensors, they are taken from it.
    inside = (found for _, found in state_dicts(tensors) if names.keys() <= found.keys())
    tensors = next(inside, tensors)
    for name in names:
        if name not in tensors:
            raise IFPError(f"{where}: the tensor {name} is missing.")
    for name in sorted(tensors.keys() - names.keys()):
        raise IFPError(f"{where}: the tensor {name} is left over.")
    return {ours: tensors[name] for name, ours in names.items()}


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return any((directory / name).is_file() for name in names)


def generation_config(where: str | Path | None) -> list[Path]:
    """Find a directory's ``generation_config.json``, if it has one: it names the end tokens."""
    files = [expanded(where) / "generation_config.json"] if where is not None else []
    return [file for file in files if file.is_file()]
