"""What is trained: a dense LLM and its sparsity predictor, and how they become a checkpoint."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm import load as load_mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model

from ..checkpoint import Checkpoint, open_checkpoint
from ..config import CONFIG_FILE, IFPConfig
from ..device import default_dtype
from ..errors import IFPError, reason_of
from ..locate import expanded, resolve, source_name
from ..masks import soft_topk
from ..predictor import Predictor, PredictorHead
from ..structure import FFN, build_model, find_embedding, find_ffns, get_module, set_module
from ..subnetwork import share
from ..tokenizers import load_tokenizer_of
from ..weights import load_tensors
from .networks import gathered, masked
from .quantization_aware import Rounding

FINE_TUNE_TYPES = ("full", "layers", "ffn", "lora", "predictor")


@dataclass
class Source:
    """What training starts from.

    Attributes:
        name: of the model, as the checkpoint will have it.
        path: the model's directory.
        config: the LLM's mlx-lm config, without a quantization.
        tokenizer: the LLM's.
        llm: an mlx-lm model with float weights.
        ffns: its FFNs.
        checkpoint: if it is a checkpoint of ours, what it says.
        digest: of the weights' files.
        dtype: what the weights are stored in.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tokenizer: TokenizerWrapper
    llm: nn.Module
    ffns: list[FFN]
    checkpoint: Checkpoint | None
    digest: str
    dtype: mx.Dtype


# What weights are trained in, whatever they are stored in. In float16 AdamW's epsilon and the
# squares of most gradients are 0, and its first update divides 0 by 0. In bfloat16 most updates are
# smaller than a weight's last bit (at a rate of 1e-5, 97% of the weights of a small model did not
# change in 100 steps).
TRAINED_IN = mx.float32


def load_source(
    model: str,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
    *,
    frozen: bool = False,
) -> Source:
    """A dense mlx-lm model, or the LLM of a checkpoint, as a model that can be trained.

    Quantized weights are dequantized.

    Args:
        model (str): a directory or hub id.
        dtype (mx.Dtype): cast to this type; None for :data:`TRAINED_IN`.
        trust_remote_code (bool): let the tokenizer run code of its repository.
        frozen (bool): its own weights are not trained; without a ``dtype`` they stay as stored, but
            on a CPU.

    Raises:
        IFPError: if it cannot be loaded or pruned.
    """
    path, tokenizer_config = expanded(model), {"trust_remote_code": trust_remote_code}
    if not path.exists():
        path = resolve(model, converted=False)
    checkpoint = None
    if (path / CONFIG_FILE).is_file():
        checkpoint = open_checkpoint(path)
        tokenizer = load_tokenizer_of(checkpoint, tokenizer_config)
        config = dict(checkpoint.config)
        llm = _assemble(checkpoint)
    else:
        try:
            llm, tokenizer, config = load_mlx_lm(
                str(path), tokenizer_config, lazy=True, return_config=True
            )
        except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
            raise IFPError(f"{model} cannot be loaded: {reason_of(error)}") from error
        llm = dequantize_model(llm)
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    ffns = find_ffns(llm)
    stored = next(a.dtype for _, a in tree_flatten(llm.parameters()) if _is_float(a))
    llm = _cast(llm, dtype or (default_dtype() if frozen else TRAINED_IN))
    mx.eval(llm.parameters())
    files = sorted(path.glob("*.safetensors"))
    return Source(
        source_name(model), path, config, tokenizer, llm, ffns, checkpoint, _digest(files), stored
    )


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _cast(model: nn.Module, dtype: mx.Dtype | None) -> nn.Module:
    if dtype is not None:
        model.update(tree_map(lambda a: a.astype(dtype) if _is_float(a) else a, model.parameters()))
    return model


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _assemble(checkpoint: Checkpoint) -> nn.Module:
    """The dense model of a checkpoint, with mlx-lm's layout of down projections."""
    quantization = checkpoint.config.get("quantization")
    if quantization is not None:
        raise IFPError(
            f"{checkpoint.path} is quantized; train from the checkpoint it was made of, "
            "or dequantize it with mlx_ifp.convert -d."
        )
    model = build_model(checkpoint.config)
    arrays = load_tensors(checkpoint.trunk, None)
    channels = load_tensors(checkpoint.channels, None)
    for ffn in checkpoint.ffns:
        own = {name: channels.pop(name) for name in list(channels) if name.startswith(ffn.path)}
        down = f"{ffn.path}.down_proj.weight"
        own[down] = own[down].T
        if ffn.fused:
            for part in ("weight", "bias"):
                pair = [own.pop(f"{ffn.path}.{p}.{part}", None) for p in ("gate_proj", "up_proj")]
                if pair[0] is not None:
                    own[f"{ffn.path}.gate_up_proj.{part}"] = mx.concatenate(pair)
        arrays |= own
    model.load_weights(list(arrays.items()), strict=False)
    return model


class Student(nn.Module):
    """LLM and predictor as one tree of parameters: ``llm``, ``backbone``, ``head``.

    Args:
        llm (nn.Module): the dense model.
        ffns (list): its FFNs.
        backbone (nn.Module): an mlx-lm model, or None if one static mask is trained.
        head (PredictorHead): None likewise.
        ifp (IFPConfig): k, mask, text and head as the checkpoint will have them.
        static (mx.array): float32 [L, d_ffn], scores that are the same for every text.
        embedding (str): where the LLM's embedding is put in the backbone, if it is shared.
        rounding (Rounding): run the LLM's weights as they will be quantized; None runs the floats.
    """

    def __init__(
        self,
        llm: nn.Module,
        ffns: list[FFN],
        backbone: nn.Module | None,
        head: PredictorHead | None,
        ifp: IFPConfig,
        static: mx.array | None = None,
        embedding: str = "",
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__()
        self.llm = llm
        if backbone is not None:
            self.backbone, self.head = backbone, head
        # Names with an underscore are no parameters.
        self._ffns, self._ifp, self._static = ffns, ifp, static
        self._embedding, self._rounding = embedding, rounding

    @property
    def ffns(self) -> list[FFN]:
        """The LLM's FFNs."""
        return self._ffns

    @property
    def ifp(self) -> IFPConfig:
        """What the checkpoint will say."""
        return self._ifp

    @property
    def static(self) -> mx.array | None:
        """float32 [L, d_ffn], or None if the predictor scores."""
        return self._static

    @property
    def k(self) -> int:
        """Channels kept in each layer."""
        return self._ifp.k

    def scores(self, selecting: mx.array, lengths: mx.array) -> mx.array:
        """Channel scores of texts, differentiable.

        Args:
            selecting (mx.array): int32 [B, n], right-padded.
            lengths (mx.array): int32 [B].

        Returns:
            mx.array: float32 [B, L, d_ffn].
        """
        if self._static is not None:
            return mx.broadcast_to(self._static, (selecting.shape[0], *self._static.shape))
        backbone = self.backbone
        if self._ifp.predictor_embedding == "llm":
            backbone = share(backbone)
            embedding = get_module(self.llm, find_embedding(self.llm))
            set_module(backbone, self._embedding, embedding)
        predictor = Predictor(backbone, self.head, len(self._ffns))
        return predictor.batch_scores(selecting, lengths)

    def channels(self, scores: mx.array) -> mx.array:
        """The k channels of each layer, ascending: int32 [L, k] of scores [L, d_ffn]."""
        best = mx.argpartition(-mx.stop_gradient(scores), self.k - 1, axis=-1)[..., : self.k]
        return mx.sort(best, axis=-1)

    def trunk(self) -> nn.Module:
        """The LLM as a network of its own is made of it: but for the FFNs, its weights are rounded.

        Without rounding, the LLM itself.
        """
        return self.llm if self._rounding is None else self._rounding.trunk(self.llm)

    def narrow(self, trunk: nn.Module, scores: mx.array, temperature: float) -> nn.Module:
        """The sub-network of scores [L, d_ffn], as :func:`~mlx_ifp.tuner.networks.gathered`.

        Args:
            trunk (nn.Module): of :meth:`trunk`.
            scores (mx.array): float32 [L, d_ffn].
            temperature (float): epsilon of SoftTopK.
        """
        indices = self.channels(scores)
        soft = None
        if self._ifp.mask.operator != "topk":
            soft = soft_topk(scores, self.k, operator=self._ifp.mask.operator,
                             temperature=temperature)  # fmt: skip
            soft = mx.take_along_axis(soft, indices, axis=-1)
        more = () if self._rounding is None else (self._rounding.rows,)
        return gathered(trunk, self._ffns, indices, soft, *more)

    def wide(
        self, trunk: nn.Module, scores: mx.array, temperature: float, blend: float = 1.0
    ) -> nn.Module:
        """The masked full network of scores [B, L, d_ffn]; the same arguments."""
        indices = self.channels(scores)
        kept = mx.put_along_axis(mx.zeros(scores.shape), indices, mx.array(1.0), axis=-1)
        if self._ifp.mask.operator != "topk":
            kept = kept * soft_topk(scores, self.k, operator=self._ifp.mask.operator,
                                    temperature=temperature)  # fmt: skip
        return self.masked(trunk, kept, blend)

    def masked(self, trunk: nn.Module, masks: mx.array, blend: float = 1.0) -> nn.Module:
        """The full network under masks [B, L, d_ffn]."""
        wide = trunk if self._rounding is None else self._rounding.wide(trunk)
        return masked(wide, self._ffns, masks, blend)


def choose_trainable(
    student: Student, fine_tune_type: str, lora_parameters: dict[str, Any], num_layers: int = -1
) -> None:
    """Freeze what is not to be trained.

    Args:
        student (Student): changed in place.
        fine_tune_type (str): ``full``: everything; ``layers``: all but embeddings and output layer
            (what ``mlx_lm.lora`` calls full); ``ffn``: the FFNs; ``lora``: mlx-lm's LoRA layers;
            ``predictor``: nothing of the LLM. The predictor is trained in all of them.
        lora_parameters (dict): mlx-lm's: rank, dropout, scale, keys.
        num_layers (int): layers to train, from the last one; -1 for all.
    """
    llm = student.llm
    layers = llm.layers if num_layers == -1 else llm.layers[-num_layers:]
    if fine_tune_type == "full":
        llm.unfreeze()
    else:
        llm.freeze()
    if fine_tune_type == "layers":
        for layer in layers:
            layer.unfreeze()
    elif fine_tune_type == "ffn":
        for ffn in student.ffns[-len(layers) :]:
            get_module(llm, ffn.path).unfreeze()
    elif fine_tune_type == "lora":
        if lora_parameters.get("dropout"):
            # A gathered network has LoRA's update in its weights, which nothing can be left out of.
            raise IFPError("lora_parameters: dropout must be 0.")
        try:
            linear_to_lora_layers(llm, len(layers), lora_parameters)
        except (KeyError, TypeError) as error:
            raise IFPError(f"lora_parameters need rank, dropout and scale: {error}.") from error
        if not tree_flatten(llm.trainable_parameters()):
            raise IFPError(
                f"lora_parameters: the keys {lora_parameters.get('keys')} are no linear layers "
                f"of this model."
            )
