"""A causal LM whose FFN channels a mask leaves out, and the sparsity predictor that scores them.

Any transformers model with a gated FFN in each layer will do. None of its code is copied: the mask
multiplies what goes into each ``down_proj``, in a hook (paper, section 3.1:
``FFN(X, m) = down(act(gate(X)) * up(X) * m)``). B rows, S tokens, L layers, F channels a layer.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from masks import mask_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

HEAD_WIDTH = 128  # the paper's, section 3.1


class ModelError(Exception):
    """What is wrong with a model, in one line."""


def load_llm(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal LM of transformers."""
    return _load(AutoModelForCausalLM, path, dtype)


def load_backbone(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A pretrained backbone for the predictor, as in the paper: any body of transformers."""
    return _load(AutoModel, path, dtype)


def _load(kind: type, path: str, dtype: torch.dtype) -> nn.Module:
    try:
        return kind.from_pretrained(path, dtype=dtype).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} is no model that transformers can load: {reason}") from error


def find_ffns(llm: nn.Module) -> list[nn.Linear]:
    """The down projections of a model's gated FFNs, one for each decoder layer.

    An FFN is a module with ``gate_proj``, ``up_proj`` and ``down_proj``, or with ``gate_up_proj``
    and ``down_proj``.
    """
    downs = []
    layers = getattr(llm.get_decoder(), "layers", None) or []
    for i, layer in enumerate(layers):
        found = [module for module in layer.modules() if _is_ffn(module)]
        if len(found) != 1:
            raise ModelError(
                f"layer {i} of the {llm.config.model_type} model has {len(found)} gated FFNs, not "
                "one with gate_proj, up_proj (or gate_up_proj) and down_proj; train another model"
            )
        downs.append(found[0].down_proj)
    if len({down.in_features for down in downs}) != 1:
        raise ModelError("the FFNs have different widths, or there are none; train another model")
    return downs


def _is_ffn(module: nn.Module) -> bool:
    def linear(name: str) -> bool:
        return isinstance(getattr(module, name, None), nn.Linear)

    gated = (linear("gate_proj") and linear("up_proj")) or linear("gate_up_proj")
    return gated and linear("down_proj")


def _apply_mask(down: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The hook before each down projection.

    Its module holds the mask [B or 1, 1, F], and where it does not hold: bool [B, S, 1], or True
    for every call of more than one token.
    """
    dense = down.ifp_dense
    if down.ifp_mask is None or (dense is True and args[0].shape[1] > 1):
        return None
    mask = down.ifp_mask.to(args[0].dtype)
    if isinstance(dense, Tensor):
        mask = torch.where(dense, 1, mask)
    return (args[0] * mask, *args[1:])


class Predictor(nn.Module):
    """The sparsity predictor: a backbone, and a head that reads its last token's hidden state.

    The head is the one of the layout "manifest": a LayerNorm without parameters, then
    Linear(D, P), LeakyReLU(0.1), Linear(P, L * F). Its names are those of the file, too.

    Args:
        extractor (nn.Module): a body of transformers (``AutoModel``) with hidden size D; None if
            the head reads what the LLM itself, with all of its channels, makes of the prompt.
        layers (int): L, of the LLM.
        channels (int): F.
        hidden_size (int): D, if there is no extractor.
        head_width (int): P.
    """

    def __init__(
        self,
        extractor: nn.Module | None,
        layers: int,
        channels: int,
        hidden_size: int | None = None,
        head_width: int = HEAD_WIDTH,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.shape = (layers, channels)
        if extractor is not None:
            hidden_size = extractor.config.get_text_config().hidden_size
        first = nn.Linear(hidden_size, head_width)
        last = nn.Linear(head_width, layers * channels, bias=False)
        # A small last layer: no text differs from another at first.
        nn.init.zeros_(first.bias)
        nn.init.normal_(last.weight, std=0.01)
        self.mlp = nn.Sequential(first, nn.LeakyReLU(0.1), last)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores, float32 [B, L, F], of texts [B, n] that are padded on the right."""
        hidden = self.extractor(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(last_token(hidden, attention_mask))

    def head(self, feature: Tensor) -> Tensor:
        """Scores, float32 [B, L, F], of the last tokens' hidden states [B, D]."""
        with torch.autocast(feature.device.type, enabled=False):
            feature = functional.layer_norm(feature.float(), feature.shape[-1:], eps=1e-5)
            scores = self.mlp(feature.to(self.mlp[0].weight.dtype)).float()
        return scores.reshape(len(scores), *self.shape)

    @torch.no_grad()
    def start_from_mean(self, mean: Tensor) -> None:
        """Let the scores start as a mean [L, F]: hidden unit 0 becomes the bias the head lacks."""
        self.mlp[0].weight[0] = 0
        self.mlp[0].bias[0] = 1
        self.mlp[2].weight[:, 0] = mean.flatten()


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The last token's state [B, D] of hidden states [B, n, D] of texts padded on the right.

    The backbone is causal: what stands right of a text's last token does not reach it.
    """
    last = attention_mask.sum(dim=-1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class StaticScores(nn.Module):
    """Scores that are the same for every text: one parameter [L, F]."""

    def __init__(self, layers: int, channels: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(0.01 * torch.randn(layers, channels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """float32 [B, L, F]."""
        return self.scores.float().expand(len(input_ids), -1, -1)

    @torch.no_grad()
    def start_from_mean(self, mean: Tensor) -> None:
        """Let the scores start as [L, F]."""
        self.scores.copy_(mean)


def first_layers(llm: nn.Module, layers: int) -> nn.Module:
    """A backbone of the LLM's first layers, copied, and of its embedding, which is shared."""
    config = copy.deepcopy(llm.config.get_text_config())
    of = config.num_hidden_layers
    if not 1 <= layers <= of:
        raise ModelError(f"--predictor-layers must be between 1 and the LLM's {of}, not {layers}")
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == of:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    backbone = AutoModel.from_config(config)
    backbone.to(next(llm.parameters()).dtype)
    own = backbone.state_dict()
    theirs = llm.get_decoder().state_dict()
    if any(name not in theirs or theirs[name].shape != own[name].shape for name in own):
        raise ModelError("the LLM's first layers make no model of their own; --predictor-model")
    backbone.load_state_dict({name: theirs[name] for name in own})
    backbone.set_input_embeddings(llm.get_input_embeddings())
    return backbone.eval()


class MaskedLM(nn.Module):
    """A dense LLM and what scores its channels.

    Args:
        llm (nn.Module): a causal LM of transformers.
        predictor (nn.Module): a Predictor or StaticScores; None if only given masks are used.
        k (int): channels kept in each layer, if a call does not say; None for all.
        operator, temperature, mode (str, float, str): of :func:`masks.mask_of`.
        prefill (str): ``pruned``, or ``dense`` if all channels read the prompt, and the mask holds
            for the answer's tokens only.
    """

    def __init__(
        self,
        llm: nn.Module,
        predictor: nn.Module | None = None,
        *,
        k: int | None = None,
        operator: str = "sigmoid",
        temperature: float = 0.1,
        mode: str = "straight_through",
        prefill: str = "pruned",
    ) -> None:
        super().__init__()
        self.llm, self.predictor = llm, predictor
        self.prefill = prefill
        downs = find_ffns(llm)
        self.layers, self.channels = len(downs), downs[0].in_features
        self.k = self.channels if k is None else k
        self.operator, self.temperature, self.mode = operator, temperature, mode
        # A tuple is no child: the modules are the LLM's.
        self.downs = tuple(downs)
        # Checkpointed layers read their masks again in the backward pass.
        self.keep_masks = False
        for down in downs:
            if not hasattr(down, "ifp_mask"):
                down.register_forward_pre_hook(_apply_mask)
            down.ifp_mask = down.ifp_dense = None

    def scores(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores of texts that select: int [B, n], padded on the right -> float32 [B, L, F]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.reads_own_state:
            return self.predictor.head(self.own_state(input_ids, attention_mask))
        return self.predictor(input_ids, attention_mask)

    @property
    def reads_own_state(self) -> bool:
        """Whether the predictor is a head on what the LLM itself makes of the prompt."""
        return isinstance(self.predictor, Predictor) and self.predictor.extractor is None

    @torch.no_grad()
    def own_state(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The dense LLM's final state [B, d] of the last token of texts [B, n].

        The head learns from it; the LLM does not learn through it.
        """
        feature = last_token(self.hidden(input_ids), attention_mask)
        # Weights that autocast keeps from here would have no gradients in the next pass.
        torch.clear_autocast_cache()
        return feature

    def masks(
        self,
        scores: Tensor,
        k: int | None = None,
        *,
        temperature: float | None = None,
        mode: str | None = None,
    ) -> Tensor:
        """Masks of scores, float32 [B, L, F]; what is not given is the model's own."""
        return mask_of(
            scores, k or self.k, self.operator, temperature or self.temperature, mode or self.mode
        )

    def set_masks(
        self, masks: Tensor | None, blend: float = 1.0, dense: Tensor | bool | None = None
    ) -> None:
        """Let the next calls of the LLM run under masks [B, L, F] or [L, F]; None is dense.

        With ``blend`` a channel is ``h * (1 - blend) + blend * h * m``. ``dense`` says for which
        positions all channels are used: bool [B, S, 1], or True for calls of several tokens.
        """
        if masks is not None:
            masks = masks[None] if masks.ndim == 2 else masks
            if masks.shape[1:] != (self.layers, self.channels):
                raise ValueError(
                    f"masks must be [B, {self.layers}, {self.channels}], not {list(masks.shape)}"
                )
            masks = masks if blend == 1.0 else 1 - blend + blend * masks
        for i, down in enumerate(self.downs):
            down.ifp_mask = None if masks is None else masks[:, i, None, :]
            down.ifp_dense = None if masks is None else dense

    @contextlib.contextmanager
    def masked(self, masks: Tensor | None) -> Iterator[nn.Module]:
        """The LLM under masks, for instance to ``generate``; dense again afterwards.

        Where the prompt is read by all channels, a call of several tokens is the prompt.
        """
        self.set_masks(masks, dense=self.prefill == "dense" or None)
        try:
            yield self.llm
        finally:
            self.set_masks(None)

    def hidden(
        self,
        input_ids: Tensor,
        masks: Tensor | None = None,
        blend: float = 1.0,
        attention_mask: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, S, d] of tokens [B, S], under masks or dense.

        Rows padded on the right need no attention mask. ``dense``, bool [B, S, 1], says where the
        mask does not hold.
        """
        self.set_masks(masks, blend, dense)
        try:
            body = self.llm.get_decoder()
            return body(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        finally:
            if not (self.keep_masks and torch.is_grad_enabled()):
                self.set_masks(None)

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits [..., V] of final hidden states [..., d].

        Args:
            hidden (Tensor): of :meth:`hidden`.
            weight (Tensor): stands for the output layer's weight [V, d], if given.
        """
        layer = self.llm.get_output_embeddings()
        config = self.llm.config.get_text_config()
        weight = layer.weight if weight is None else weight
        logits = functional.linear(hidden, weight, layer.bias)
        # What transformers' models do to logits, by their configs' names.
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        masks: Tensor | None = None,
        blend: float = 1.0,
    ) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] under masks [B, L, F]; without, of the dense LLM."""
        return self.logits(self.hidden(input_ids, masks, blend, attention_mask))

    @torch.no_grad()
    def check_logits(self) -> None:
        """Raise ModelError if the model's logits are not those of :meth:`logits`."""
        ids = torch.arange(3, 9, device=next(self.llm.parameters()).device)[None]
        theirs = self.llm(input_ids=ids, use_cache=False).logits.float()
        ours = self(ids).float()
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
            raise ModelError(
                f"the output layer of {self.llm.config.model_type} is not supported; train another"
            )


def backbone_from_config(config: dict) -> nn.Module:
    """An empty backbone of a config that a checkpoint holds."""
    config = dict(config)
    made = AutoConfig.for_model(config.pop("model_type"), **config)
    return AutoModel.from_config(made).eval()
