"""The bytes that a checkpoint will take in memory, computed before any weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.directory import Checkpoint
from ..checkpoint.weights import build_backbone, build_trunk
from ..files.tensor_files import DTYPES, TensorInfo
from ..llm.ffn import FFN, PROJECTIONS
from ..llm.kv_cache import Generation, kv_bytes
from ..llm.modules import PARTS, PREFILL_STEP_SIZE, find_body, get_module, set_module


def size_text(nbytes: int) -> str:
    """Bytes for people: a GB is 10^9 bytes, an MB 10^6."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class Use:
    """What a checkpoint is to be used for.

    Attributes:
        ks: channels kept in each of L layers; d_ffn for the dense model.
        generation: lengths, and how keys and values are kept.
        selector: what selects, or None if nothing has to be selected.
        selector_tokens: the number of tokens of the text that selects.
        networks: the number of sub-networks that are in memory at the same time.
        dense: whether it is the dense model.
        dense_prefill: whether the dense model reads the prompt, layer by layer, before the
            sub-network is loaded.
    """

    ks: list[int]
    generation: Generation
    selector: str | None = None
    selector_tokens: int = 1
    networks: int = 1
    dense: bool = False
    dense_prefill: bool = False


@dataclass(frozen=True)
class Budget:
    """Bytes in memory, by part. Intermediate results of a step are not counted.

    Attributes:
        trunk: all of the LLM but its FFN channels; always there.
        selector: what selects, or None.
        selector_weights: bytes of the predictor, or of the one FFN that the dense LLM holds while
            it reads what selects.
        selector_kv: bytes of the selector's own keys and values.
        network: bytes of one sub-network's channels.
        networks: how many sub-networks are counted.
        kv: bytes of the LLM's keys and values.
        prefill_weights: bytes of the one FFN that the dense model holds while it reads the prompt;
            0 if it does not.
        prefill_kv: bytes of the keys and values that it makes, before any is quantized.
        staying: bytes of the predictor that may stay in memory while tokens are generated.
    """

    trunk: int
    selector: str | None
    selector_weights: int
    selector_kv: int
    network: int
    networks: int
    kv: int
    prefill_weights: int = 0
    prefill_kv: int = 0
    staying: int = 0

    @property
    def selecting(self) -> int:
        """Bytes while the selector runs, when the next sub-network is not there yet."""
        others = (self.networks - 1) * self.network
        return self.trunk + others + self.selector_weights + self.selector_kv

    @property
    def prefilling(self) -> int:
        """Bytes while the dense model reads the prompt, if it does; then that of the trunk."""
        if not self.prefill_weights:
            return self.trunk
        others = (self.networks - 1) * self.network
        return self.trunk + others + self.prefill_weights + self.prefill_kv

    @property
    def generating(self) -> int:
        """Bytes while tokens are generated, when the selector is gone."""
        return self.trunk + self.networks * self.network + self.kv

    @property
    def least(self) -> int:
        """The smallest limit that this fits into."""
        least = max(self.prefilling, self.generating)
        return max(self.selecting, least) if self.selector else least

    @property
    def total(self) -> int:
        """The peak if the predictor stays in memory."""
        if self.selector != "predictor":
            return self.least
        return max(self.least, self.generating + self.staying)

    def keeps_predictor(self, limit: int) -> bool:
        """Whether the predictor may stay in memory while tokens are generated."""
        return self.total <= limit

    def fitting_networks(self, limit: int) -> int:
        """How many sub-networks fit. The predictor's bytes count if it may stay in memory."""
        stays = self.staying if self.keeps_predictor(limit) else 0
        return max(0, (limit - self.trunk - self.kv - stays) // self.network)


class Estimator:
    """Computes the bytes of a checkpoint's parts as they will be in memory.

    Args:
        checkpoint (Checkpoint): an opened one.
        dtype (mx.Dtype): the type that floats will be cast to; None keeps them.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype | None) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.kv = lru_cache(maxsize=64)(self._kv)

    def _dtype(self, tensor: TensorInfo) -> mx.Dtype:
        stored = DTYPES[tensor.dtype]
        floats = mx.issubdtype(stored, mx.floating)
        return self.dtype if floats and self.dtype is not None else stored

    def _nbytes(self, tensor: TensorInfo) -> int:
        return tensor.nbytes // DTYPES[tensor.dtype].size * self._dtype(tensor).size

    def _placeholders(self, model: nn.Module, tensors: dict[str, TensorInfo]) -> None:
        """Give a model lazy zeros of the tensors' shapes and of the types they will have."""
        arrays = [(n, mx.zeros(t.shape, self._dtype(t))) for n, t in tensors.items()]
        model.load_weights(arrays, strict=False)

    @cached_property
    def _llm(self) -> nn.Module:
        """The LLM's modules with lazy weights. Stand-ins for FFNs have the same effect on types."""
        model = build_trunk(self.checkpoint, self.checkpoint.d_ffn)
        self._placeholders(model, self.checkpoint.trunk)
        for ffn in self.checkpoint.ffns:
            names = [f"{ffn.path}.down_proj.bias"] if "down_proj" in ffn.biases else []
            tensors = [self.checkpoint.trunk[name] for name in names]
            tensors += [tensor for _, tensor in self._channels(ffn)]
            dtypes = {self._dtype(tensor) for tensor in tensors}
            floats = [dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)]
            set_module(model, ffn.path, _TypeOfFFN(floats))
        return model

    @cached_property
    def _backbone(self) -> nn.Module:
        model = build_backbone(self.checkpoint, self._llm)
        self._placeholders(model, self.checkpoint.predictor)
        return model

    def _channels(self, ffn: FFN) -> Iterator[tuple[str, TensorInfo]]:
        for projection in PROJECTIONS:
            for part in PARTS:
                tensor = self.checkpoint.channels.get(f"{ffn.path}.{projection}.{part}")
                if tensor is not None:
                    yield f"{projection}.{part}", tensor

    @cached_property
    def trunk(self) -> int:
        """Bytes of the trunk, including tables of rotary embeddings."""
        tensors = sum(map(self._nbytes, self.checkpoint.trunk.values()))
        return tensors + _bytes_of_tables(self._llm)

    @cached_property
    def predictor(self) -> int:
        """Bytes of the predictor: head and backbone, without anything that the trunk has."""
        checkpoint = self.checkpoint
        if checkpoint.reads_own_state:
            return sum(map(self._nbytes, checkpoint.head.values()))
        tensors = [*checkpoint.predictor.values(), *checkpoint.head.values()]
        body = get_module(self._backbone, find_body(self._backbone))
        return sum(map(self._nbytes, tensors)) + _bytes_of_tables(body)

    def network(self, ks: list[int], *, dense: bool = False) -> int:
        """Bytes of the channels of a sub-network.

        Args:
            ks (list): channels of each of L layers.
            dense (bool): whether it is the dense model, which has no soft values.
        """
        soft = self.checkpoint.ifp.mask.keep_soft_values and not dense
        total = 0
        for ffn, kept in zip(self.checkpoint.ffns, ks, strict=True):
            channels = dict(self._channels(ffn))
            total += kept * sum(self._nbytes(t) // t.shape[0] for t in channels.values())
            # 8-bit scales cannot take the soft values; a float down projection can.
            apart = "up_proj.scales" in channels and "up_proj.biases" not in channels
            if soft and apart and "down_proj.scales" in channels:
                total += kept * mx.float32.size
        return total

    def selector(self, selector: str | None, tokens: int) -> tuple[int, int]:
        """Bytes that a selector needs while it runs: its weights, its keys and values.

        Args:
            selector (str): a name of :data:`~mlx_ifp.choices.SELECTORS`, or None for none.
            tokens (int): the number of tokens of the text that selects.
        """
        if selector is None:
            return 0, 0
        stored = sum(map(self._nbytes, self.checkpoint.static.values()))
        if selector == "static":
            return stored, 0
        generation = Generation(tokens, prefill_step_size=PREFILL_STEP_SIZE)
        if selector == "predictor" and not self.checkpoint.reads_own_state:
            return self.predictor, self.kv(generation, backbone=True, selector=True)
        scores = stored if selector == "glass" else 0
        head = self.predictor if selector == "predictor" else 0
        return head + scores + self.largest_ffn, self.kv(generation, selector=True)

    @cached_property
    def largest_ffn(self) -> int:
        """Bytes of a layer's whole FFN while it is read, of the layer where that is most."""
        layers = []
        for ffn in self.checkpoint.ffns:
            tensors = [tensor for _, tensor in self._channels(ffn)]
            layers.append(sum(map(self._nbytes, tensors)))
            # Rows in the type that they have on disk stay in memory until all of them are cast.
            layers[-1] += sum(t.nbytes for t in tensors if self._dtype(t) != DTYPES[t.dtype])
        return max(layers)

    def _kv(self, generation: Generation, *, backbone: bool = False, selector: bool = False) -> int:
        """Bytes of the keys and values of the LLM or of the predictor's backbone."""
        model = self._backbone if backbone else self._llm
        return kv_bytes(model, generation, selector=selector)

    def budget(self, use: Use) -> Budget:
        """All parts of a use.

        Raises:
            IFPError: if its keys and values cannot be quantized as it says.
        """
        weights, selector_kv = self.selector(use.selector, use.selector_tokens)
        prefill_weights = prefill_kv = 0
        if use.dense_prefill:
            # The pass is over before mlx-lm can quantize, and it reads the last token, too.
            floats = replace(use.generation.kv, kv_bits=None)
            generation = replace(use.generation, max_tokens=0, kv=floats)
            prefill_weights = self.largest_ffn
            prefill_kv = self.kv(generation, selector=True)
        return Budget(
            trunk=self.trunk,
            selector=use.selector,
            selector_weights=weights,
            selector_kv=selector_kv,
            network=self.network(use.ks, dense=use.dense),
            networks=use.networks,
            kv=self.kv(use.generation),
            prefill_weights=prefill_weights,
            prefill_kv=prefill_kv,
            staying=self.predictor if use.selector == "predictor" else 0,
        )


class _TypeOfFFN(nn.Module):
    """Stands in for an FFN where only types count: the result has the type that weights give it."""

    def __init__(self, dtypes: list[mx.Dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __call__(self, x: mx.array) -> mx.array:
        for dtype in self._dtypes:
            x = x + mx.zeros((1,), dtype)
        return x


def _bytes_of_tables(model: nn.Module) -> int:
    """Bytes of arrays that are not parameters, such as frequencies of rotary embeddings."""
    parameters = dict(tree_flatten(model.parameters()))
    tables = {
        id(array): array.nbytes
        for name, array in dict(tree_flatten(model)).items()
        if isinstance(array, mx.array) and name not in parameters
    }
    return sum(tables.values())


def k_text(ks: list[int]) -> str:
    """``k = 768``, or the smallest and the largest k if layers differ."""
    least, most = min(ks), max(ks)
    return f"k = {least}" if least == most else f"k = {least} to {most}"
