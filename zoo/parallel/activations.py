"""Bytes of activations that one rank keeps for the backward pass, block by block.

Counted is what autograd saves in the forward pass of ``zoo.layers`` and ``zoo.moe`` on a GPU with a fused RMSNorm and a
flash attention kernel; the scores that soft-capped attention writes out are not. Routed rows are those of a balanced
router, sorted and moved by a dispatcher; the CPU's own way with local experts (``zoo.moe.blocked``) keeps less. Per
token, with b bytes an element (2 in bf16-mixed) and t tensor ranks:

    norms       2 (b D + 4): their inputs, and an fp32 root mean square each; 4 where they stand before and after
    attention   b D + b d (2 H + 2 G) / t + 4 H / t: input; q, k, v and the output; an fp32 log-sum-exp.
                With norms of q and k their inputs as well: b d (H + G) / t + 4 (H + G) / t, of
                norms over all heads together b d (H + G) + 8
    MLA         b (D + 2 q + 2 (r + p)) + b H (n + v + 2 (n + p) + v) / t + 4 H / t: the latents before and after their
                norms; keys and values as expanded; q and k as put together; the output
    dense FFN   b D + 4 b F / t: input; gate, silu, up and their product
    MoE         b D + 4 D (the router's fp32 input, in bf16-mixed) + 8 E + 16 K: logits and scores; weights, indices
                + K / t · (b D + 4 b F + 4 D): an expert's input, the inside of its FFN, its output widened to fp32;
                where tokens travel to other ranks it is b D and not 4 D, as it is not widened
                + 4 b F_shared / t, and b D where the shared experts are gated
    head        3 b D + 4: final norm; the gradient of its output, which the loss computes at once

Beside these, for each token of one chunk of the loss (``linear_nll``): b D + 4 V, in bf16-mixed 2 V more, and
4 V more of soft-capped logits. These are the logits, which become their gradient, and its product with the head.

Shapes: D model, F FFN, H query heads, G key/value heads, d head size, E experts, K top-k, V vocabulary; of MLA: q and r
query and key-value latent, n, p and v sizes of a head without position, rotary, and of values.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig
from zoo.layers.linear_nll import chunk_tokens
from zoo.parallel.communication import mean_destinations
from zoo.parallel.footprint import Recompute
from zoo.parallel.mesh import MeshSizes

WIDE = 4
"""Bytes of an fp32 element."""


@dataclass(frozen=True, kw_only=True)
class BlockActivations:
    """Bytes per token of one block."""

    whole: float
    """All that its backward pass needs."""
    mixer: float
    """The part of it that is left once the FFN has gone backward."""
    inside_experts: float
    """The part of it that ``recompute: experts`` does not keep."""
    input: float
    """What ``recompute: block`` keeps."""
    returning: float
    """Gradients on their way from the block's output to those of the experts' rows: no activation is freed yet."""
    ffn_gradients: float
    """Gradients inside the FFN or the experts while most of their activations are still there."""

    def kept(self, recompute: Recompute) -> float:
        """Bytes that stay between the forward and the backward pass."""
        if recompute == "block":
            return self.input
        return self.whole - (self.inside_experts if recompute == "experts" else 0)

    def running(self, recompute: Recompute) -> float:
        """Bytes at the end of the forward pass of the block's FFN."""
        return self.whole - self.mixer if recompute == "block" else self.whole


def block_activations(config: ModelConfig, layer: int, itemsize: int, sizes: MeshSizes) -> BlockActivations:
    """Activations of layer number ``layer`` (from 0), ``itemsize`` bytes an element, per token of the data rank."""
    tensor = sizes.tensor
    width = itemsize * config.hidden_size
    if config.mla:
        mixer = _mla(config.mla, itemsize, tensor)
    else:
        assert config.attention is not None
        mixer = _attention(config.attention, itemsize, tensor)
    norms = 4 if config.norm_placement == "both" else 2
    mixer += norms * (width + WIDE) + width
    if not config.is_moe_layer(layer):
        inner = itemsize * config.intermediate_size / tensor
        return BlockActivations(
            whole=mixer + width + 4 * inner,
            mixer=mixer,
            inside_experts=0.0,
            input=width,
            returning=0.0,
            ffn_gradients=2 * inner,
        )
    assert config.moe is not None
    inner = itemsize * config.moe.moe_intermediate_size * config.moe.top_k / tensor
    return BlockActivations(
        whole=mixer + _moe_without_experts(config.hidden_size, config.moe, itemsize, sizes) + 4 * inner,
        mixer=mixer,
        inside_experts=4 * inner,
        input=width,
        returning=_returning_rows(config.hidden_size, config.moe, itemsize, sizes),
        # The grouped kernel works on all rows at once; in fp32 one expert goes backward after the other.
        ffn_gradients=0.0 if itemsize == WIDE else 2 * inner,
    )


def head_activations(config: ModelConfig, itemsize: int) -> float:
    """Bytes per token of the final norm and of the gradient of its output, freed before any block's."""
    return 3 * itemsize * config.hidden_size + WIDE


def loss_chunk(config: ModelConfig, itemsize: int, tokens: int) -> float:
    """Bytes of the logits that are there at a time in the loss of ``tokens``."""
    copies = WIDE + (itemsize if itemsize < WIDE else 0) + (0 if config.logit_softcap is None else WIDE)
    chunk = min(tokens, chunk_tokens(config.vocab_size, "cuda"))
    return chunk * (copies * config.vocab_size + itemsize * config.hidden_size)


def _attention(a: AttentionConfig, itemsize: int, tensor: int) -> float:
    both = a.num_heads + a.num_kv_heads
    values = itemsize * a.head_dim * 2 * both + WIDE * a.num_heads
    root_mean_squares = both if a.qk_norm == "head" else 2
    norms = itemsize * a.head_dim * both + WIDE * root_mean_squares if a.qk_norm else 0
    return (values + norms) / tensor


def _mla(m: MLAConfig, itemsize: int, tensor: int) -> float:
    latents = 2 * (m.q_lora_rank or 0) + 2 * (m.kv_lora_rank + m.qk_rope_head_dim)
    expanded = m.qk_nope_head_dim + m.v_head_dim
    head = expanded + 2 * (m.qk_nope_head_dim + m.qk_rope_head_dim) + m.v_head_dim
    return itemsize * latents + m.num_heads * (itemsize * head + WIDE) / tensor


def _moe_without_experts(hidden_size: int, m: MoEConfig, itemsize: int, sizes: MeshSizes) -> float:
    width, tensor = itemsize * hidden_size, sizes.tensor
    router = (WIDE * hidden_size if itemsize < WIDE else 0) + 2 * WIDE * m.num_experts + 4 * WIDE * m.top_k
    travel = sizes.expert > 1 or tensor > 1
    rows = m.top_k / tensor * (width + (width if travel else WIDE * hidden_size))
    shared = 4 * itemsize * m.num_shared_experts * m.moe_intermediate_size / tensor
    return width + router + rows + shared + (width if m.shared_expert_gate else 0)


def _returning_rows(hidden_size: int, m: MoEConfig, itemsize: int, sizes: MeshSizes) -> float:
    """Where tokens travel, the gradients that came, one a row, its product with the weight, and three fp32 copies of a
    row for the gradient of the weight (one in fp32); else an fp32 gradient a row."""
    rows = m.top_k / sizes.tensor * hidden_size
    if sizes.expert == sizes.tensor == 1:
        return WIDE * rows
    copies = 3 if itemsize < WIDE else 1
    came = mean_destinations(m, sizes.expert) / sizes.tensor * hidden_size
    return itemsize * came + (2 * itemsize + copies * WIDE) * rows
