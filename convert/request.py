"""What a conversion is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from mlx_ifp.checkpoint.precision import Precision, Precisions
from mlx_ifp.selection.keep import Keep

from .layouts.parts import Given


@dataclass(frozen=True)
class ConversionRequest:
    """The options of a conversion; they are those of ``mlx_ifp.convert``.

    Attributes:
        model: a file, a directory or a hub id: a model of Hugging Face or mlx-lm, a GGUF file of
            the llama architecture, a trained checkpoint of a known layout, or a checkpoint of
            mlx_ifp.
        mlx_path: the checkpoint to make; it must not exist.
        keep: k, as a count, a fraction (float) or a list of L counts; None takes what the layout
            says, or half of the channels of a dense model.
        quantize_weights, q_bits, q_group_size, q_mode, quant_predicate, dequantize_weights, dtype:
            as in ``mlx_lm.convert``. A trained checkpoint and one of mlx_ifp keep their types
            unless ``dtype`` is given; one of mlx_ifp may be dequantized and quantized anew.
        predictor_dtype, predictor_q_bits, predictor_q_group_size: the same for the predictor, if
            it shall differ from the LLM; 0 bits leave it unquantized.
        head_q_bits: the bits of the predictor's head, which is quantized in the predictor's groups;
            None leaves it unquantized.
        layout: ``split``, ``module``, ``manifest`` or ``dense``; None detects it.
        llm_config, predictor_config: a ``config.json``, or a directory or hub id that has one.
        tokenizer, predictor_tokenizer: where to take the tokenizers from, if not from the model.
        text_format: how the text that selects is tokenized, ``raw`` or ``chat_template``. The
            default is ``raw`` with a predictor, and without one ``chat_template`` if the tokenizer
            has a template.
        static_prompts: a text or jsonl file of prompts; their mean ``activations`` scores become
            the scores of the ``static`` selector.
        prior: how many prompts the model makes up itself; its answers to them give the scores of
            the selectors ``static`` and ``glass``, and an untrained checkpoint then uses ``glass``.
            True takes the usual number, 0 or False makes no prior, and None makes one of a dense
            model if that is quick.
        keep_by_layer: let one threshold over all layers say how many channels each keeps, with k as
            their mean; None keeps what a checkpoint says.
        calibrate: a text or jsonl file of prompts; the channels that the checkpoint's selector
            selects together for them are stored side by side.
        upload_repo: a hub repository to upload the checkpoint to.
        dry_run: print what would be done, and write nothing.
        revision: the revision of a hub repository.
        trust_remote_code: let the tokenizer run code of its repository.
    """

    model: str
    mlx_path: Path = Path("mlx_model")
    keep: Keep | None = None
    quantize_weights: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str = "affine"
    quant_predicate: str | None = None
    dequantize_weights: bool = False
    dtype: str | None = None
    predictor_dtype: str | None = None
    predictor_q_bits: int | None = None
    predictor_q_group_size: int | None = None
    head_q_bits: int | None = None
    layout: str | None = None
    llm_config: str | None = None
    predictor_config: str | None = None
    tokenizer: str | None = None
    predictor_tokenizer: str | None = None
    text_format: str | None = None
    static_prompts: str | Path | None = None
    prior: bool | int | None = False
    keep_by_layer: bool | None = None
    calibrate: str | Path | None = None
    upload_repo: str | None = None
    dry_run: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def precisions(self) -> Precisions:
        """How each part of the checkpoint shall be stored.

        Raises:
            IFPError: if the options contradict one another.
        """
        llm = Precision(
            self.dtype,
            self.quantize_weights,
            self.q_bits,
            self.q_group_size,
            self.q_mode,
            self.quant_predicate,
        )
        return Precisions.of(
            llm,
            self.predictor_dtype,
            self.predictor_q_bits,
            self.predictor_q_group_size,
            self.head_q_bits,
        )

    @property
    def given(self) -> Given:
        """The parts that the user names because a trained checkpoint may lack them."""
        return Given(
            self.llm_config,
            self.predictor_config,
            self.tokenizer,
            self.predictor_tokenizer,
            self.keep,
        )

    @property
    def for_predictor(self) -> bool:
        """Whether the user has named something that only a model with a predictor can use."""
        return bool(self.predictor_config or self.predictor_tokenizer or self.head_q_bits)
