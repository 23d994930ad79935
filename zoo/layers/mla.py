"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1, equations 9 to 19).

Shapes: B batch, S sequence, Q asking tokens, D model, H heads, L key slots, r kv_lora_rank, n qk_nope_head_dim,
p qk_rope_head_dim, v v_head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.config import ModelConfig, yarn_mscale
from zoo.layers.attend import attend
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm
from zoo.layers.rope import rotary_of_last, rotate
from zoo.layers.sequence import SequenceLayout, tail


class MLA(nn.Module):
    """Keys and values are expanded from one latent a token; one rotary key is shared by all heads.

    The cache holds the normalised latent and the rotary key only: r + p numbers a token. Decoding uses the absorbed
    form, in which W_UK moves to the query and W_UV to the output, so that the latent is never expanded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mla = config.mla
        assert mla is not None and config.rope is not None
        self.rope_layout = config.rope.layout
        self.num_heads = mla.num_heads
        self.kv_lora_rank = mla.kv_lora_rank
        self.nope, self.rope, self.v_head_dim = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.scale = (self.nope + self.rope) ** -0.5
        if config.rope.yarn and config.rope.yarn.mscale_all_dim:
            # DeepSeek's second YaRN factor: on the softmax scale, once for q and once for k.
            self.scale *= yarn_mscale(config.rope.yarn.factor, config.rope.yarn.mscale_all_dim) ** 2
        width, q_width = config.hidden_size, mla.num_heads * (self.nope + self.rope)
        if mla.q_lora_rank is None:
            self.q_proj = Linear(width, q_width, bias=False)
        else:
            self.q_a_proj = Linear(width, mla.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(mla.q_lora_rank, config.norm_eps)
            self.q_b_proj = Linear(mla.q_lora_rank, q_width, bias=False)
        self.has_q_latent = mla.q_lora_rank is not None
        self.kv_a_proj = Linear(width, mla.kv_lora_rank + self.rope, bias=False)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, config.norm_eps)
        self.kv_b_proj = Linear(mla.kv_lora_rank, mla.num_heads * (self.nope + self.v_head_dim), bias=False)
        self.o_proj = Linear(mla.num_heads * self.v_head_dim, width, bias=False)
        # Absorbed, a query takes 2(r + p) products a key and head in place of n + p + v; expanding takes r(n + v).
        more = 2 * (self.kv_lora_rank + self.rope) - (self.nope + self.rope + self.v_head_dim)
        expansion = self.kv_lora_rank * (self.nope + self.v_head_dim)
        self.absorbed_up_to = math.inf if more <= 0 else expansion / more

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        last: int | None = None,
    ) -> Tensor:
        """x [B, S, D], rotary cos and sin [B, S, 1, p/2] → [B, S, D]; appends the latent to ``cache`` where given.

        With ``last`` only so many tokens, the last, ask: [B, last, D].
        """
        asking, x_q = layout.last(last), tail(x, last)
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_q))) if self.has_q_latent else self.q_proj(x_q)
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope + self.rope)).split((self.nope, self.rope), dim=-1)
        q_rope = rotate(q_rope, *rotary_of_last(rotary, q.shape[1]), self.rope_layout)
        latent, k_rope = self.kv_a_proj(x).split((self.kv_lora_rank, self.rope), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), *rotary, self.rope_layout).squeeze(2)
        keys = torch.cat((self.kv_a_norm(latent), k_rope), dim=-1)
        if cache is not None:
            (keys,) = cache.append(layout.past, keys)
        form = self.absorbed if asking.past and q.shape[1] <= self.absorbed_up_to else self.expanded
        return self.o_proj(form(q_nope, q_rope, keys, asking).flatten(-2))

    def expanded(self, q_nope: Tensor, q_rope: Tensor, keys: Tensor, layout: SequenceLayout) -> Tensor:
        """The paper's equations as written: keys and values of every head are made from the latent.

        Args:
            q_nope: [B, Q, H, n]. q_rope: [B, Q, H, p]. keys: [B, L, r + p], latent and rotary key.
            layout: of the Q tokens.

        Returns:
            [B, Q, H, v].
        """
        latent, k_rope = keys.split((self.kv_lora_rank, self.rope), dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.v_head_dim)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, kv.shape[1], -1, -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        return attend(q, k, v, layout, self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, keys: Tensor, layout: SequenceLayout) -> Tensor:
        """The same result with q_nope·W_UK against the latent, then W_UV: multi-query attention over r + p numbers.

        Arguments and result as ``expanded``. The heads become rows of one query matrix, so that a step is two plain
        matrix products over the cache.
        """
        w_uk, w_uv = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank).split(
            (self.nope, self.v_head_dim), dim=1
        )
        q = torch.cat((_per_head(q_nope, w_uk), q_rope), dim=-1)
        k, mask = keys.unsqueeze(1), layout.mask
        if mask is not None:
            mask = mask.repeat_interleave(self.num_heads, dim=2)
        # The keys are the values as well, rotary part and all: kernels that are fast want both of one size.
        out = F.scaled_dot_product_attention(q.flatten(1, 2).unsqueeze(1), k, k, attn_mask=mask, scale=self.scale)
        return _per_head(out.view_as(q)[..., : self.kv_lora_rank], w_uv.mT)

    def new_cache(self, batch_size: int, max_length: int) -> LayerCache:
        """Empty latents and rotary keys in one buffer [B, L, r + p]."""
        weight = self.kv_a_proj.weight
        shape = (batch_size, max_length, self.kv_lora_rank + self.rope)
        return LayerCache([torch.zeros(shape, dtype=weight.dtype, device=weight.device)])


def _per_head(x: Tensor, weights: Tensor) -> Tensor:
    """x [B, S, H, i], a matrix of each head [H, i, o] → [B, S, H, o]."""
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), weights).transpose(0, 1).unflatten(0, x.shape[:2])
