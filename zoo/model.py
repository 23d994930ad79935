"""The decoder: the only skeleton, in call order.

Shapes: B batch, S sequence, D model, V vocabulary, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import cast

import torch
from torch import Tensor, nn

from zoo.cache import Cache, LayerCache
from zoo.config import ModelConfig
from zoo.layers.attention import (
    Attention,
    ClampedAttention,
    PositionlessAttention,
    SinkAttention,
    SoftcappedAttention,
)
from zoo.layers.ffn import FFNS
from zoo.layers.interleaved_rope import ChunkedAttention, UnplacedAttention
from zoo.layers.linear import Linear, linear
from zoo.layers.linear_nll import linear_nll
from zoo.layers.mamba import Mamba, initial_parameter
from zoo.layers.mla import MLA
from zoo.layers.norm import LayerNorm, RMSNorm, UnitOffsetRMSNorm
from zoo.layers.relative_attention import RelativeAttention
from zoo.layers.rope import NoRotary, Rotary
from zoo.layers.scaling import Scale, ScaledEmbedding, SoftCap
from zoo.layers.sequence import SequenceLayout, sequence_layout, tail
from zoo.moe.layer import MoE, moe_layer
from zoo.moe.router import RouterOutput


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """Result of one forward."""

    logits: Tensor
    """[B, S, last or logits_to_keep, V]"""
    hidden: Tensor
    """[B, S or last, D], after the final norm."""
    router_outputs: tuple[RouterOutput, ...]
    """One a MoE layer, in order, each over all B·S tokens (of the final block with ``last`` over B·last); those of MTP
    modules, where they ran, after them."""
    mtp_hidden: tuple[Tensor, ...] = ()
    """Of MTP module k = 1, 2, …, where they ran: [B, S, D]; ``Decoder.logits`` of position i are those of token
    i + k + 1. The last k positions of a row or document are meaningless."""


class Block(nn.Module):
    """x + norm(mixer(norm(x))), then x + norm(ffn(norm(x))), of both norms those that there are; dense or MoE FFN."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.mixer_norm = _norm(config) if before else nn.Identity()
        self.mixer = _mixer(config, layer)
        self.mixer_post_norm = _norm(config) if after else nn.Identity()
        self.ffn_norm = _norm(config) if before else nn.Identity()
        self.ffn = moe_layer(config) if config.is_moe_layer(layer) else _ffn(config)
        self.ffn_post_norm = _norm(config) if after else nn.Identity()
        # One each: torch's tools that follow a forward pass take a module for one place in it.
        self.mixer_dropout, self.ffn_dropout = (
            nn.Dropout(config.dropout) if config.dropout else nn.Identity() for _ in range(2)
        )

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        last: int | None = None,
    ) -> tuple[Tensor, RouterOutput | None]:
        """x [B, S, D] → ([B, S, D], the routing where the FFN is MoE); with ``last`` both of the last tokens only."""
        mixed = self.mixer(self.mixer_norm(x), layout, rotary, cache, last)
        x = tail(x, last) + self.mixer_dropout(self.mixer_post_norm(mixed))
        h = self.ffn_norm(x)
        out, routing = self.ffn(h, layout.last(last)) if isinstance(self.ffn, MoE) else (self.ffn(h), None)
        return x + self.ffn_dropout(self.ffn_post_norm(out)), routing


class SparseDenseBlock(Block):
    """``Block`` with experts, and after them x + norm(dense_ffn(norm(x))) (arXiv 2202.08906, published code)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.dense_ffn_norm = _norm(config) if before else nn.Identity()
        self.dense_ffn = _ffn(config)
        self.dense_ffn_post_norm = _norm(config) if after else nn.Identity()
        self.dense_ffn_dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        last: int | None = None,
    ) -> tuple[Tensor, RouterOutput | None]:
        """See ``Block``."""
        x, routing = super().forward(x, layout, rotary, cache, last)
        return x + self.dense_ffn_dropout(self.dense_ffn_post_norm(self.dense_ffn(self.dense_ffn_norm(x)))), routing


class MTPModule(Block):
    """One module of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, equations 21 to 23).

    h'ᵢᵏ = Mₖ [RMSNorm(Emb(tᵢ₊ₖ)); RMSNorm(hᵢᵏ⁻¹)] goes through a block of the model's own kind; the shared output head
    makes of hᵢᵏ the prediction of tᵢ₊ₖ₊₁. As in the published weights, h⁰ is the decoder's output after its final norm,
    every module ends in a norm of its own, and the embedding is the first half of what Mₖ takes.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = _norm(config)
        self.hnorm = _norm(config)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.norm = _norm(config)

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        last: int | None = None,
    ) -> tuple[Tensor, RouterOutput | None]:
        """x [B, S, 2·D], embeddings of the tokens k later beside hᵏ⁻¹ → (hᵏ [B, S, D], the routing if MoE)."""
        embeddings, hidden = x.chunk(2, dim=-1)
        x = self.eh_proj(torch.cat((self.enorm(embeddings), self.hnorm(hidden)), dim=-1))
        x, routing = super().forward(x, layout, rotary, cache, last)
        return self.norm(x), routing


class Decoder(nn.Module):
    """A decoder-only language model. Parameters are uninitialised: use ``build`` or load weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config)
        self.layers = nn.ModuleList(_block(config, layer) for layer in range(config.num_layers))
        self.mtp = nn.ModuleList(MTPModule(config, config.num_layers + depth) for depth in range(config.mtp_depth))
        self.norm = _norm(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.logit_scaling = _logit_scaling(config)
        self.rotary = NoRotary() if config.rope is None else Rotary(config.rope, _rotary_size(config))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        last: int | None = None,
        logits_to_keep: int | None = 0,
        mtp: bool = False,
    ) -> DecoderOutput:
        """Logits of the next token at every position.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S], 1 for tokens and 0 for padding on either side; with a cache, of the new tokens.
            document_ids: [B, S] int64 for packed documents: attention stays within neighbours of equal id and
                positions restart at each document.
            cache: from ``new_cache``; the new tokens are appended to it.
            last: hidden states and logits of the last so many positions only; None: of all. Of the others the final
                block computes keys and values and nothing else, so that its routing is of these positions only.
            logits_to_keep: compute logits of the last so many positions only; 0 is all, ``None`` none.
            mtp: run the MTP modules as well, on all positions; not with a cache, which is of the layers only.

        Raises:
            ValueError: shapes that do not fit, a full cache, or ``mtp`` or ``document_ids`` with what they exclude.
        """
        if last is not None and (mtp or document_ids is not None):
            raise ValueError(f"last = {last} with mtp or document_ids: they need every position; leave one out")
        if cache is not None:
            if mtp:
                raise ValueError("mtp = True with a cache: the modules need the tokens that follow; leave one out")
            cache.check_room(input_ids)
        layout = sequence_layout(
            input_ids,
            attention_mask=attention_mask,
            document_ids=document_ids,
            past=cache.length if cache else 0,
            past_valid=cache.valid if cache else None,
        )
        x = self.embed_tokens(input_ids)
        routing = self.config.moe.routing if self.config.moe else None
        of_final = last if routing is None or routing.tokenwise else None
        rotary = self.rotary(layout.positions, layout.keys, x.dtype)
        router_outputs = []
        for i, block in enumerate(self.layers):
            is_final = i == len(self.layers) - 1
            x, routed = block(x, layout, rotary, cache.layers[i] if cache else None, of_final if is_final else None)
            if routed is not None:
                router_outputs.append(routed)
        if cache is not None:
            cache.advance(input_ids.shape[1], attention_mask)
        hidden = self.norm(tail(x, last))
        mtp_hidden, mtp_routing = self._look_ahead(hidden, input_ids, layout, rotary) if mtp else ((), ())
        kept = hidden[:, :0] if logits_to_keep is None else hidden[:, -logits_to_keep:]
        return DecoderOutput(self.logits(kept), hidden, (*router_outputs, *mtp_routing), mtp_hidden)

    def _look_ahead(
        self, hidden: Tensor, input_ids: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[RouterOutput, ...]]:
        """h¹, h², … and routing of the MTP modules, one after the other, from h⁰ = ``hidden`` [B, S, D]."""
        outputs, routings = [], []
        for k, module in enumerate(self.mtp, start=1):
            # Where no k-th token follows, another comes round: causality keeps what it does to its own position.
            embeddings = self.embed_tokens(input_ids.roll(-k, dims=1))
            hidden, routing = module(torch.cat((embeddings, hidden), dim=-1), layout, rotary, None)
            outputs.append(hidden)
            if routing is not None:
                routings.append(routing)
        return tuple(outputs), tuple(routings)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] after the final norm → [..., V]."""
        return self.logit_scaling(linear(hidden, self._head()))

    def nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of −ln p of ``labels`` [...], ``IGNORED`` where there is none, after ``hidden`` [..., D]: nats, fp32.

        The loss of ``logits(hidden)``, which are never there as a whole (``zoo.layers.linear_nll``).
        """
        return linear_nll(
            hidden.flatten(0, -2),
            self._head(),
            labels.flatten(),
            multiplier=1.0 if self.config.logit_multiplier is None else self.config.logit_multiplier,
            cap=self.config.logit_softcap,
        )

    def _head(self) -> Tensor:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for ``batch_size`` rows of at most ``max_length`` tokens, in the model's dtype and device."""
        layers = [cast(Block, block).mixer.new_cache(batch_size, max_length) for block in self.layers]
        return Cache(layers, batch_size, max_length)


def _block(config: ModelConfig, layer: int) -> Block:
    followed = config.moe is not None and config.moe.dense_ffn and config.is_moe_layer(layer)
    return (SparseDenseBlock if followed else Block)(config, layer)


def _embedding(config: ModelConfig) -> nn.Embedding:
    if config.embedding_multiplier is None:
        return nn.Embedding(config.vocab_size, config.hidden_size)
    return ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_multiplier)


def _logit_scaling(config: ModelConfig) -> nn.Module:
    if config.logit_softcap is not None:
        return SoftCap(config.logit_softcap)
    return nn.Identity() if config.logit_multiplier is None else Scale(config.logit_multiplier)


def _mixer(config: ModelConfig, layer: int) -> Attention | MLA | Mamba:
    if config.is_mamba_layer(layer):
        return Mamba(config)
    if config.attention is None:
        return MLA(config)
    if config.rope is None:
        return (RelativeAttention if config.attention.relative_positions else PositionlessAttention)(config, layer)
    if config.attention.interleaved_rope:
        return (UnplacedAttention if config.attention.chunk(layer) is None else ChunkedAttention)(config, layer)
    special = {"sinks": SinkAttention, "logit_softcap": SoftcappedAttention, "clip_qkv": ClampedAttention}
    kind = next((kind for field, kind in special.items() if getattr(config.attention, field)), Attention)
    return kind(config, layer)


def _ffn(config: ModelConfig) -> nn.Module:
    return FFNS[config.ffn](config.hidden_size, config.intermediate_size)


def _norm(config: ModelConfig) -> nn.Module:
    kind = {"rms": RMSNorm, "unit_offset_rms": UnitOffsetRMSNorm, "layer": LayerNorm}[config.norm]
    return kind(config.hidden_size, config.norm_eps)


def _rotary_size(config: ModelConfig) -> int:
    if config.mla:
        return config.mla.qk_rope_head_dim
    assert config.attention is not None
    return config.attention.head_dim


def build(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Decoder:
    """A decoder with fresh weights."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to_empty(device=device).to(dtype)
    initialize(model, seed)
    return model


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Fill every parameter: norms 1, biases and sinks 0, all else normal with the config's ``initializer_range``.

    What a recurrence begins with is ``zoo.layers.mamba.initial_parameter``'s.

    Each tensor is drawn from its own generator, seeded by (seed, parameter name, expert index): what a parameter gets
    does not depend on the other parameters, on dtype, or on how the model is spread over devices. An expert is drawn
    as the matrix it is, never as a slice of a stacked fan-in.
    """
    std = model.config.initializer_range
    # Lightning builds models where another device is the default.
    with torch.device("cpu"):
        for name, parameter in model.named_parameters():
            for index, values in initial_values(name, parameter.shape, seed, std, range(len(parameter))):
                parameter[index].copy_(values)
    for buffer in model.buffers():
        buffer.zero_()


def initial_values(
    name: str, shape: torch.Size, seed: int, std: float, experts: range
) -> Iterator[tuple[int | EllipsisType, Tensor]]:
    """(index, values fp32) of one parameter: the whole at once, or of a stacked one each of the given ``experts``."""
    special = initial_parameter(name, shape, _generator(f"{seed}/{name}"))
    if special is not None:
        yield ..., special
    elif name.endswith(("bias", "offset", "sinks")):
        yield ..., torch.zeros(shape)
    elif len(shape) == 1:
        yield ..., torch.ones(shape)
    elif ".experts." in name:
        for expert in experts:
            yield expert, _normal(f"{seed}/{name}/{expert}", shape[1:], std)
    else:
        yield ..., _normal(f"{seed}/{name}", shape, std)


def _normal(key: str, shape: torch.Size, std: float) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=_generator(key))


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
