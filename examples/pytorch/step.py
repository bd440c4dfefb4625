"""The loss of a batch as one module, and how it is compiled."""

from typing import Any

import torch
from data import DeviceData
from losses import blockwise_loss, terms
from model import MaskedLM
from torch import Tensor, nn
from validate import validate


class Step(nn.Module):
    """The loss of a batch, as one module: what accelerate wraps for several processes.

    Args:
        model (MaskedLM): what is trained.
        teacher (MaskedLM): the frozen dense model, or None; no part of the module.
        dtype (torch.dtype): of computation.
        block (int): positions whose logits are made at once.
    """

    def __init__(
        self, model: MaskedLM, teacher: MaskedLM | None, dtype: torch.dtype, block: int
    ) -> None:
        super().__init__()
        self.model, self.terms = model, terms
        self.settings = (teacher, dtype, block)

    def forward(self, work: str, *args: Any) -> Any:
        """``loss`` or ``measure``: what shards a module's weights gathers them around this call."""
        dtype = self.settings[1]
        kind = next(self.model.parameters()).device.type
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return getattr(self, work)(*args)

    def measure(self, teacher: MaskedLM, data: DeviceData, batches: Any, k: int) -> dict[str, Any]:
        """What :func:`validate.validate` says."""
        _, dtype, block = self.settings
        return validate(self.model, teacher, data, batches, k, block=block, dtype=dtype)

    def loss(
        self, batch: Any, k: int, temperature: float, blend: float, ce: float, kl: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and as values its cross-entropy and KL.

        Args:
            batch (Batch): of ``data.py``.
            k (int): channels kept.
            temperature (float): of SoftTopK.
            blend (float): 0 is the dense model, 1 the masked one.
            ce, kl (float): what an answer's token counts for in the cross-entropy, and any token
                whose position is in the batch in the KL.
        """
        model, (teacher, dtype, block) = self.model, self.settings
        scores = model.scores(batch.selecting, batch.selecting_mask)
        masks = model.masks(scores, k, temperature=temperature)
        dense_on = batch.prompt if model.prefill == "dense" else None
        hidden = model.hidden(batch.tokens, masks, blend, dense=dense_on).flatten(0, 1)
        dense = None
        if teacher is not None and kl:
            with torch.no_grad():
                theirs = teacher.hidden(batch.tokens).flatten(0, 1)[batch.places]
            dense = (theirs, teacher.llm.get_output_embeddings().weight)
        return blockwise_loss(
            hidden.index_select(0, batch.places), model.llm.get_output_embeddings().weight,
            model.logits, dense, batch.labels, batch.answer * ce, batch.every * kl,
            block=block, dtype=dtype, terms_of=self.terms,
        )  # fmt: skip

    def compile_parts(self) -> None:
        """Compile the layers and the terms of the loss; one graph serves all layers of a model.

        What cannot be compiled shows in the first step, forwards or backwards.
        """
        # The mask is an attribute of a module, and has as many rows as the batch.
        torch._dynamo.config.force_nn_module_property_static_shapes = False
        # A batch of as many rows as a head has values is no special case.
        torch.fx.experimental._config.use_duck_shape = False
        torch._dynamo.config.cache_size_limit = 64
        for each in (self.model, self.settings[0]):
            for layer in each.llm.get_decoder().layers if each is not None else ():
                layer.compile(dynamic=True)
        self.terms = torch.compile(terms, dynamic=False)
