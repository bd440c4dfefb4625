"""The student is what is trained: a dense LLM and its sparsity predictor."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..checkpoint.config import IFPConfig
from ..errors import IFPError
from ..llm.ffn import FFN
from ..llm.modules import find_embedding, get_module, set_module, share
from ..selection.masks import soft_topk
from ..selectors.predictor import Predictor, PredictorHead
from .networks import gathered, masked
from .quantization_aware import Rounding


class Student(nn.Module):
    """LLM and predictor as one tree of parameters: ``llm``, ``backbone``, ``head``.

    Args:
        llm (nn.Module): the dense model.
        ffns (list): its FFNs.
        backbone (nn.Module): an mlx-lm model, or None if one static mask is trained.
        head (PredictorHead): the predictor's head, or None likewise.
        ifp (IFPConfig): k, mask, text and head as the checkpoint will have them.
        static (mx.array): float32 [L, d_ffn], scores that are the same for every text.
        embedding (str): where the LLM's embedding is put in the backbone, if it is shared.
        rounding (Rounding): rounds the LLM's weights as quantization will; None runs the floats.
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
        if backbone is not None and head is not None:
            self.backbone, self.head = backbone, head
        # MLX does not count attributes as parameters if their names begin with an underscore.
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
        k = self._ifp.k
        assert isinstance(k, int), "training has one k for all layers"
        return k

    def scores(self, selecting: mx.array, lengths: mx.array) -> mx.array:
        """Compute channel scores of texts, which are differentiable.

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

    def channels(self, scores: mx.array, k: int) -> mx.array:
        """The k channels of each layer, ascending: int32 [L, k] of scores [L, d_ffn]."""
        best = mx.argpartition(-mx.stop_gradient(scores), k - 1, axis=-1)[..., :k]
        return mx.sort(best, axis=-1)

    def trunk(self) -> nn.Module:
        """The LLM that networks are made of; all weights but those of its FFNs are rounded.

        Without rounding, it is the LLM itself.
        """
        return self.llm if self._rounding is None else self._rounding.trunk(self.llm)

    def narrow(
        self, trunk: nn.Module, scores: mx.array, temperature: float, k: int | None = None
    ) -> nn.Module:
        """Make the sub-network of scores [L, d_ffn] by :func:`~mlx_ifp.tuner.networks.gathered`.

        Args:
            trunk (nn.Module): the network that :meth:`trunk` gives.
            scores (mx.array): float32 [L, d_ffn].
            temperature (float): epsilon of SoftTopK.
            k (int): channels to keep in each layer; None for the checkpoint's k.
        """
        k = self.k if k is None else k
        indices = self.channels(scores, k)
        soft = self._soft_mask(scores, temperature, k)
        if soft is not None:
            soft = mx.take_along_axis(soft, indices, axis=-1)
        more = () if self._rounding is None else (self._rounding.rows,)
        return gathered(trunk, self._ffns, indices, soft, *more)

    def wide(
        self,
        trunk: nn.Module,
        scores: mx.array,
        temperature: float,
        blend: float = 1.0,
        k: int | None = None,
    ) -> nn.Module:
        """Make the masked full network of scores [B, L, d_ffn]; arguments as in :meth:`narrow`."""
        k = self.k if k is None else k
        indices = self.channels(scores, k)
        kept = mx.put_along_axis(mx.zeros(scores.shape), indices, mx.array(1.0), axis=-1)
        soft = self._soft_mask(scores, temperature, k)
        return self.masked(trunk, kept if soft is None else kept * soft, blend)

    def _soft_mask(self, scores: mx.array, temperature: float, k: int) -> mx.array | None:
        """Compute SoftTopK of scores [..., d_ffn]; None if the mask is hard."""
        operator = self._ifp.mask.operator
        if operator == "topk":
            return None
        return soft_topk(scores, k, operator=operator, temperature=temperature)

    def masked(self, trunk: nn.Module, masks: mx.array, blend: float = 1.0) -> nn.Module:
        """Make the full network under masks [B, L, d_ffn]."""
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
        lora_parameters (dict): as in mlx-lm: rank, dropout, scale, keys.
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
            # A gathered network has LoRA's update in its weights, where dropout cannot act.
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
