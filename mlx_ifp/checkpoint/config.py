"""``ifp_config.json``: what a checkpoint says about its selectors, masks and files."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..choices import PREFILLS, SELECTORS
from ..errors import one_line

OPERATORS = ("topk", "sigmoid", "capped_exp")


CONFIG_FILE = "ifp_config.json"
# This is the package's own checkpoint, which is used if none is named.
DEFAULT_MODEL = Path(__file__).parents[1] / "default_model"
FORMAT_VERSION = 2
# Fields that came with version 2 have defaults.
READABLE_VERSIONS = (1, 2)
ACTIVATIONS = ("none", "gelu", "relu", "leaky_relu", "silu")
FEATURE_NORMS = ("none", "layer_norm")
TEXT_FORMATS = ("raw", "chat_template")
TEXT_SOURCES = ("user", "system")
EMBEDDINGS = ("own", "llm")
BACKBONES = ("own", "llm")
ORDERS = ("original", "stored")


@dataclass
class HeadConfig:
    """The predictor's head: Linear layers with an activation between them (paper, section 3.1).

    Attributes:
        widths: input width, hidden widths, output width L * d_ffn.
        biases: whether each Linear has a bias.
        activation: the activation between the Linears; ``gelu`` is the exact (erf) one, and
            ``leaky_relu`` has slope 0.1.
        feature_norm: the norm of the backbone's hidden state; ``layer_norm`` has no learned
            parameters, and its eps is 1e-5.
    """

    widths: list[int]
    biases: list[bool]
    activation: str = "gelu"
    feature_norm: str = "none"

    def check(self) -> None:
        """Raises ValueError if a field is out of range."""
        _require(
            len(self.widths) >= 2 and all(_is_count(width) for width in self.widths),
            "head.widths must be at least two positive numbers",
        )
        _require(
            len(self.biases) == len(self.widths) - 1
            and all(isinstance(bias, bool) for bias in self.biases),
            "head.biases must hold one true or false a Linear",
        )
        _one_of("head.activation", self.activation, ACTIVATIONS)
        _one_of("head.feature_norm", self.feature_norm, FEATURE_NORMS)


@dataclass
class MaskConfig:
    """How scores become a mask (paper, section 3.1).

    Attributes:
        operator: ``topk``, ``sigmoid`` or ``capped_exp``.
        temperature: epsilon of SoftTopK.
        keep_soft_values: whether inference multiplies each kept channel by its lambda.
    """

    operator: str = "topk"
    temperature: float = 1.0
    keep_soft_values: bool = False

    def check(self) -> None:
        """Raises ValueError if a field is out of range."""
        _one_of("mask.operator", self.operator, OPERATORS)
        _require(
            _is_number(self.temperature) and self.temperature > 0,
            "mask.temperature must be above 0",
        )
        _require(
            isinstance(self.keep_soft_values, bool), "mask.keep_soft_values must be true or false"
        )
        _require(
            not (self.keep_soft_values and self.operator == "topk"),
            "mask.keep_soft_values needs the operator sigmoid or capped_exp",
        )


@dataclass
class TextConfig:
    """Which text selects, and how the selector's tokenizer gets it.

    Attributes:
        source: ``user`` for the first user message, ``system`` for the system message.
        format: ``raw``, or ``chat_template`` to wrap it as a user message.
        max_tokens: the longest text that is not refused.
    """

    source: str = "user"
    format: str = "raw"
    max_tokens: int = 8192

    def check(self) -> None:
        """Raises ValueError if a field is out of range."""
        _one_of("text.source", self.source, TEXT_SOURCES)
        _one_of("text.format", self.format, TEXT_FORMATS)
        _require(_is_count(self.max_tokens), "text.max_tokens must be a positive number")


def text_limit(config: dict[str, Any]) -> int:
    """How many tokens a selector with this config can read, TextConfig's default at most."""
    text_config = config.get("text_config") or {}
    context = config.get("max_position_embeddings") or text_config.get("max_position_embeddings")
    return min(context or TextConfig.max_tokens, TextConfig.max_tokens)


@dataclass
class IFPConfig:
    """The whole of ``ifp_config.json``; docs/checkpoint.md explains each field.

    Attributes:
        predictor_backbone: ``own``, or ``llm`` if the head reads the dense LLM's own hidden state.
        predictor_embedding: ``own``, or ``llm`` if the backbone uses the LLM's embedding and
            tokenizer and has neither in ``predictor/``.
        channel_order: ``original``, or ``stored`` if ``order.safetensors`` says which channel
            each row is.
        blend: the weight of the prompt's ranks, 0 to 1. In ``glass`` the rest is the prior's, and
            in a predictor whose backbone is the LLM it is the prediction's; with 0 the head's
            scores alone select.
        keep_by_layer: whether one threshold over all layers says how many channels each keeps, with
            ``k`` as their mean.
        prefill: who reads the prompt, ``dense`` or ``pruned``, unless a call says it; None for what
            suits the selector.
    """

    k: int | list[int]
    selector: str = "activations"
    mask: MaskConfig = field(default_factory=MaskConfig)
    text: TextConfig = field(default_factory=TextConfig)
    head: HeadConfig | None = None
    predictor_backbone: str = "own"
    predictor_embedding: str = "own"
    channel_order: str = "original"
    blend: float = 0.5
    keep_by_layer: bool = False
    prefill: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: Path) -> "IFPConfig":
        """Read and check a file.

        Raises:
            IFPError: if a field is wrong; the message names it and the file.
        """
        with one_line(f"{path}"):
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "IFPConfig":
        """Raises ValueError or TypeError if the values are not a valid config."""
        if not isinstance(values, dict):
            raise ValueError("must hold a JSON object")
        version = values.get("format_version")
        if not _is_count(version) or version not in READABLE_VERSIONS:
            readable = " and ".join(map(str, READABLE_VERSIONS))
            raise ValueError(
                f"format_version is {version!r}, this mlx_ifp reads {readable}; "
                "update mlx_ifp or convert the model again"
            )
        parts = {"mask": MaskConfig, "text": TextConfig, "head": HeadConfig}
        # What is read is written in the newest version.
        values = values | {"format_version": FORMAT_VERSION}
        for name, part in parts.items():
            if values.get(name) is not None:
                values[name] = _build(part, values[name], f"{name}.")
        config = _build(cls, values, "")
        config.check()
        return config

    def check(self) -> None:
        """Raises ValueError if a field is out of range."""
        ks = self.k if isinstance(self.k, list) else [self.k]
        _require(bool(ks) and all(_is_count(k) for k in ks), "k must be 1 or more")
        _one_of("selector", self.selector, SELECTORS)
        _require(isinstance(self.mask, MaskConfig), "mask must be an object")
        _require(isinstance(self.text, TextConfig), "text must be an object")
        _require(isinstance(self.source, dict), "source must be an object")
        _require(isinstance(self.files, dict), "files must be an object")
        for name, record in self.files.items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            _require(inside, f"files: {name!r} leaves the directory")
            _require(
                isinstance(record, dict)
                and _is_count(record.get("bytes"))
                and isinstance(record.get("sha256"), str),
                f"files.{name} must hold bytes, a number, and sha256, a text",
            )
        self.mask.check()
        self.text.check()
        if self.head is not None:
            self.head.check()
        _one_of("predictor_backbone", self.predictor_backbone, BACKBONES)
        _one_of("predictor_embedding", self.predictor_embedding, EMBEDDINGS)
        _one_of("channel_order", self.channel_order, ORDERS)
        _require(_is_number(self.blend) and 0 <= self.blend <= 1, "blend must be from 0 to 1")
        _require(isinstance(self.keep_by_layer, bool), "keep_by_layer must be true or false")
        _require(
            self.prefill is None or self.prefill in PREFILLS,
            f"prefill must be null or one of {', '.join(PREFILLS)}, not {self.prefill!r}",
        )
        shares = "llm" in (self.predictor_backbone, self.predictor_embedding)
        needed = self.selector == "predictor" or shares
        _require(not needed or self.head is not None, "head is missing")

    def prefill_with(self, selector: str) -> str:
        """Who reads a prompt, ``dense`` or ``pruned``, if ``selector`` selects.

        Unless ``prefill`` says it, prompts are pruned only where a predictor with a backbone of its
        own selects: an LLM that was trained with it is itself only as a sub-network. Without
        training the keys and values of the whole model are the better ones, and a head that reads
        the LLM's own state needs the whole model's pass anyway.
        """
        own = selector == "predictor" and self.predictor_backbone == "own"
        return self.prefill or ("pruned" if own else "dense")

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _build(cls: type, values: Any, prefix: str) -> Any:
    _require(isinstance(values, dict), f"{prefix.rstrip('.')} must be an object")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    _require(not unknown, f"unknown field {prefix}{unknown[0] if unknown else ''}")
    try:
        return cls(**values)
    except TypeError as error:
        missing = str(error).rpartition(": ")[2]
        raise ValueError(f"{prefix}{missing} is missing") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
