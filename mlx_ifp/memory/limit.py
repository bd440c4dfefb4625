"""A memory limit is kept: what does not fit is refused, and sub-networks make room."""

from ..llm.kv_cache import Generation
from ..selection.keep import per_layer
from ..selection.selection import Selection
from ..subnetwork.cache import SubnetworkCache
from .advice import check
from .budget import Estimator, Use


class MemoryLimit:
    """Keeps a model within its limit: it makes room, and says whether the predictor may stay.

    It counts one generation at a time and the one network that this generation uses. Whoever runs
    several says with :meth:`beside` what the others take.

    Args:
        limit (int): bytes.
        estimator (Estimator): of the checkpoint.
        networks (SubnetworkCache): the networks that make room; their bound is lowered to what is
            left.
        use (Use): what the model is expected to be used for.

    Raises:
        IFPError: if that does not fit. No weight has been read then.
    """

    def __init__(
        self, limit: int, estimator: Estimator, networks: SubnetworkCache, use: Use
    ) -> None:
        self.limit = limit
        self.estimator = estimator
        self._networks = networks
        self._most = networks.max_bytes
        self._other_kv = self._other_networks = 0
        check(estimator, use, limit)
        self.expect(use.generation, use.ks, dense=use.dense, dense_prefill=use.dense_prefill)

    def expect(
        self,
        generation: Generation,
        ks: list[int],
        *,
        dense: bool = False,
        dense_prefill: bool = False,
    ) -> None:
        """Leave room for a generation with a network of ``ks`` channels in its layers.

        With ``dense_prefill`` the whole model reads the prompt before.

        Raises:
            IFPError: if there is no room.
        """
        use = Use(ks, generation, dense=dense, dense_prefill=dense_prefill)
        budget = check(self.estimator, use, self.limit)
        self._generation, self._kv, self._network = generation, budget.kv, budget.network
        self._prefilling = budget.prefilling
        self._networks.max_bytes = min(self._most, self._left())
        self._networks.shrink(self._networks.max_bytes)

    def beside(self, kv: int, networks: int) -> None:
        """Count other generations that run at the same time.

        Args:
            kv (int): bytes of their keys and values, and of such that are kept for later.
            networks (int): bytes of the networks that they use.
        """
        self._other_kv, self._other_networks = kv, networks

    @property
    def keeps_predictor(self) -> bool:
        """Whether the predictor may stay in memory beside networks, keys and values in use."""
        others = self._other_kv + self._other_networks
        needed = self.estimator.trunk + self._network + self._kv + others + self._predictor
        return needed <= self.limit

    @property
    def _predictor(self) -> int:
        return self.estimator.predictor if self.estimator.checkpoint.head else 0

    def _left(self) -> int:
        """Bytes that all networks may take while tokens are generated."""
        stays = self._predictor if self.keeps_predictor else 0
        return self.limit - self.estimator.trunk - self._kv - self._other_kv - stays

    def _in_all_layers(self, k: int) -> list[int]:
        return per_layer(k, len(self.estimator.checkpoint.ffns))

    def before_selecting(self, selector: str, tokens: int) -> None:
        """Drop networks until a selector has room to run.

        Raises:
            IFPError: if it has no room even without them.
        """
        smallest = Use(self._in_all_layers(1), Generation(1), selector, tokens)
        check(self.estimator, smallest, self.limit)
        needed = self.estimator.trunk + sum(self.estimator.selector(selector, tokens))
        needed += self._other_kv
        if selector != "predictor" and self.keeps_predictor:
            needed += self._predictor
        self._networks.shrink(max(0, self.limit - needed))

    def before_prefill(self) -> None:
        """Drop networks until the whole model has room to read the prompt that is expected."""
        needed = self._prefilling + (self._predictor if self.keeps_predictor else 0)
        needed += self._other_kv
        self._networks.shrink(max(0, self.limit - needed))

    def before_loading(self, selection: Selection | None) -> None:
        """Drop networks until that of a selection has room; None is the dense model.

        Raises:
            IFPError: if it has no room even without them.
        """
        if selection is None:
            ks = self._in_all_layers(self.estimator.checkpoint.d_ffn)
        else:
            ks = selection.ks
        self.expect(self._generation, ks, dense=selection is None)
        self._networks.shrink(max(0, self._left() - self._network))
