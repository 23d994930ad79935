"""The encoder-decoder: the other skeleton, in call order.

Shapes: B batch, S tokens of the source, U of the target, L cached and new ones of it, D model, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import Cache, LayerCache
from zoo.encoder_decoder_config import EncoderDecoderConfig
from zoo.layers.cross_attention import MemoryAttention
from zoo.layers.ffn import GEGLU
from zoo.layers.linear import Linear, linear
from zoo.layers.norm import RMSNorm
from zoo.layers.relative_position import RelativePositionBias
from zoo.layers.ungated_ffn import ReLUFFN
from zoo.model import initial_values
from zoo.moe.capped import CappedMoE
from zoo.moe.router import RouterOutput

IGNORED = -100
"""Label of a position that the loss leaves out."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the encoder makes of a batch of sources."""

    hidden: Tensor
    """[B, S, D], after the final norm."""
    valid: Tensor | None
    """[B, S] bool, False for padding; None where there is none."""
    router_outputs: tuple[RouterOutput, ...]
    """One a layer with experts, in order, each over all B·S tokens."""


@dataclass(eq=False)
class Memory:
    """What the decoder's layers attend to: keys and values of the encoded sources, made once."""

    layers: list[LayerCache]
    """For every layer k and v, each [B, H, S, d]."""
    valid: Tensor | None
    """[B, S] bool, False for padding."""

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the batch rows numbered in ``rows`` [rows kept] int64."""
        for layer in self.layers:
            layer.keep_rows(rows)
        self.valid = None if self.valid is None else self.valid[rows]

    @property
    def mask(self) -> Tensor | None:
        """[B, 1, 1, S] bool, True where a target may look."""
        return None if self.valid is None else self.valid[:, None, None, :]


@dataclass(frozen=True, eq=False)
class EncoderDecoderOutput:
    """Result of one forward."""

    logits: Tensor
    """[B, U, V]"""
    hidden: Tensor
    """[B, U, D], of the decoder after its final norm."""
    router_outputs: tuple[RouterOutput, ...]
    """One a decoder layer with experts, in order, each over all B·U tokens."""
    encoder_router_outputs: tuple[RouterOutput, ...]
    """The same of the encoder, over B·S tokens; empty where it did not run."""


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); every token sees all of its sequence."""

    def __init__(self, config: EncoderDecoderConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = _norm(config)
        self.mixer = _attention(config)
        self.ffn_norm = _norm(config)
        self.ffn = _ffn(config, layer)

    def forward(self, x: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, RouterOutput | None]:
        """x [B, S, D], bias [B or 1, H, S, S] of the scores → ([B, S, D], the routing where there are experts)."""
        h = self.mixer_norm(x)
        x = x + self.mixer(h, *self.mixer.keys_values(h), bias)
        out, routing = _feed_forward(self.ffn, self.ffn_norm(x), valid)
        return x + out, routing


class CrossBlock(nn.Module):
    """x + attention(norm(x)), x + attention(norm(x), memory), then x + ffn(norm(x)); a token sees those before it."""

    def __init__(self, config: EncoderDecoderConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = _norm(config)
        self.mixer = _attention(config)
        self.cross_norm = _norm(config)
        self.cross_attention = _attention(config)
        self.ffn_norm = _norm(config)
        self.ffn = _ffn(config, layer)

    def forward(
        self, x: Tensor, bias: Tensor, memory: LayerCache, memory_mask: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, RouterOutput | None]:
        """x [B, U, D], bias [1, H, U, L] of the scores → ([B, U, D], the routing where there are experts).

        The keys and values of x are appended to ``cache`` where given.
        """
        h = self.mixer_norm(x)
        k, v = self.mixer.keys_values(h)
        if cache is not None:
            k, v = cache.append(bias.shape[-1] - x.shape[1], k, v)
        x = x + self.mixer(h, k, v, bias)
        x = x + self.cross_attention(self.cross_norm(x), *memory.buffers, memory_mask)
        out, routing = _feed_forward(self.ffn, self.ffn_norm(x), None)
        return x + out, routing


class Stack(nn.Module):
    """The layers of one half, the positions that they share and the norm after them."""

    def __init__(self, config: EncoderDecoderConfig, blocks: Sequence[nn.Module], bidirectional: bool) -> None:
        super().__init__()
        positions = config.relative_positions
        self.position_bias = RelativePositionBias(
            positions.num_buckets, positions.max_distance, config.num_heads, bidirectional
        )
        self.layers = nn.ModuleList(blocks)
        self.norm = _norm(config)


class EncoderDecoder(nn.Module):
    """A model of target sequences given source sequences (arXiv 1910.10683, section 2.1).

    Parameters are uninitialised: use ``build_encoder_decoder`` or load weights.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        encoder = [EncoderBlock(config, layer) for layer in range(config.num_encoder_layers)]
        decoder = [CrossBlock(config, layer) for layer in range(config.num_decoder_layers)]
        self.encoder = Stack(config, encoder, bidirectional=True)
        self.decoder = Stack(config, decoder, bidirectional=False)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> EncoderDecoderOutput:
        """Logits of the next token of the target at each of its positions.

        Args:
            input_ids: [B, S] int64, the sources.
            decoder_input_ids: [B, U] int64, the targets after ``decoder_start_id``. They are padded on the right, where
                no token before sees it.
            attention_mask: [B, S], 1 for tokens of the source and 0 for padding on either side.

        Raises:
            ValueError: shapes that do not fit.
        """
        encoded = self.encode(input_ids, attention_mask)
        out = self.decode(decoder_input_ids, self.memory(encoded))
        return EncoderDecoderOutput(out.logits, out.hidden, out.router_outputs, encoded.router_outputs)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """The sources; arguments and errors as ``forward``."""
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: give that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        valid = None if attention_mask is None else attention_mask != 0
        bias = self.encoder.position_bias(0, input_ids.shape[1])
        if valid is not None:
            # Padding sees padding, so that no row of scores is empty.
            bias = bias.masked_fill((valid[:, :, None] != valid[:, None, :])[:, None], float("-inf"))
        x = self.embed_tokens(input_ids)
        router_outputs = []
        for block in self.encoder.layers:
            x, routing = block(x, bias, valid)
            if routing is not None:
                router_outputs.append(routing)
        return Encoded(self.encoder.norm(x), valid, tuple(router_outputs))

    def memory(self, encoded: Encoded) -> Memory:
        """Keys and values of the sources for every layer of the decoder."""
        blocks = [cast(CrossBlock, block) for block in self.decoder.layers]
        return Memory([LayerCache(b.cross_attention.keys_values(encoded.hidden)) for b in blocks], encoded.valid)

    def decode(self, decoder_input_ids: Tensor, memory: Memory, cache: Cache | None = None) -> EncoderDecoderOutput:
        """Logits of the next token at each position of the targets [B, U].

        Args:
            decoder_input_ids: [B, U] int64; with a cache, the tokens after those that it holds.
            memory: of the sources.
            cache: from ``new_cache``; the tokens are appended to it.

        Raises:
            ValueError: numbers of rows that differ, or a full cache.
        """
        rows, new = decoder_input_ids.shape
        sources = len(memory.layers[0].buffers[0])
        if rows != sources:
            raise ValueError(f"decoder_input_ids has {rows} rows and input_ids {sources}: give each a target")
        if cache is not None:
            cache.check_room(decoder_input_ids)
        past = cache.length if cache else 0
        future = torch.ones(new, past + new, dtype=torch.bool, device=decoder_input_ids.device).triu(past + 1)
        bias = self.decoder.position_bias(past, new).masked_fill(future, float("-inf"))
        x = self.embed_tokens(decoder_input_ids)
        router_outputs = []
        for i, block in enumerate(self.decoder.layers):
            x, routing = block(x, bias, memory.layers[i], memory.mask, cache.layers[i] if cache else None)
            if routing is not None:
                router_outputs.append(routing)
        if cache is not None:
            cache.advance(new, None)
        hidden = self.decoder.norm(x)
        return EncoderDecoderOutput(self.logits(hidden), hidden, tuple(router_outputs), ())

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] of the decoder after its final norm → [..., V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return linear(hidden * self.config.hidden_size**-0.5, self.embed_tokens.weight)

    def loss(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean cross entropy (natural logarithm, fp32) of the targets given the sources.

        Args:
            input_ids: [B, S] int64.
            labels: [B, U] int64, the targets; ``IGNORED`` where a position does not count, such as padding.
            attention_mask: [B, S], as in ``forward``.
        """
        logits = self(input_ids, self.shifted(labels), attention_mask).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    def shifted(self, labels: Tensor) -> Tensor:
        """labels [B, U] → the decoder's input [B, U], in which each is the token before."""
        start = torch.full_like(labels[:, :1], self.config.decoder_start_id)
        ids = torch.cat((start, labels[:, :-1]), dim=1)
        return ids.masked_fill(ids == IGNORED, self.config.decoder_start_id)

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for ``batch_size`` targets of at most ``max_length`` tokens, as the model's parameters are."""
        blocks = [cast(CrossBlock, block) for block in self.decoder.layers]
        return Cache([b.mixer.new_cache(batch_size, max_length) for b in blocks], batch_size, max_length)


def _norm(config: EncoderDecoderConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.norm_eps)


def _attention(config: EncoderDecoderConfig) -> MemoryAttention:
    return MemoryAttention(config.hidden_size, config.num_heads, config.head_dim)


def _ffn(config: EncoderDecoderConfig, layer: int) -> nn.Module:
    sizes = (config.hidden_size, config.intermediate_size)
    if config.moe is not None and config.is_moe_layer(layer):
        return CappedMoE(*sizes, config.moe.num_experts, config.moe.expert_capacity)
    return {"relu": ReLUFFN, "geglu": GEGLU}[config.ffn](*sizes)


def _feed_forward(ffn: nn.Module, x: Tensor, valid: Tensor | None) -> tuple[Tensor, RouterOutput | None]:
    """Experts need to know of padding, and tell their routing."""
    return ffn(x, valid) if isinstance(ffn, CappedMoE) else (ffn(x), None)


def build_encoder_decoder(
    config: EncoderDecoderConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> EncoderDecoder:
    """An encoder-decoder with fresh weights: norms 1, the embedding normal with deviation 1, matrices 1/√fan-in.

    Queries are drawn smaller by another √head_dim, for the scores that are not divided by it. Each tensor has its own
    generator, as in ``zoo.model.initialize``.
    """
    with torch.device("meta"):
        model = EncoderDecoder(config)
    model = model.to_empty(device=device).to(dtype)
    with torch.no_grad(), torch.device("cpu"):  # Lightning builds models where another device is the default
        for name, parameter in model.named_parameters():
            deviation = _deviation(name, parameter.shape, config)
            for index, values in initial_values(name, parameter.shape, seed, deviation, range(len(parameter))):
                parameter[index].copy_(values)
    return model


def _deviation(name: str, shape: torch.Size, config: EncoderDecoderConfig) -> float:
    if name == "embed_tokens.weight":
        return 1.0
    if name.endswith("position_bias.weight"):
        return float(config.hidden_size**-0.5)
    fan_in = shape[-1] * config.head_dim if name.endswith("q_proj.weight") else shape[-1]
    return float(fan_in**-0.5)
