"""Prefix tuning (arXiv 2101.00190): trained keys and values before those of the text, added from outside the blocks.

Shapes: B batch, S new tokens, D model, G key/value heads, d head size, P prefix length, L key slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.finetune.config import PrefixConfig
from zoo.layers.attention import Attention
from zoo.layers.interleaved_rope import ChunkedAttention
from zoo.layers.relative_attention import RelativeAttention
from zoo.layers.sequence import SequenceLayout
from zoo.model import initial_values


@dataclass(frozen=True, eq=False)
class _PrefixedLayout(SequenceLayout):
    """A layout with ``prefix`` key slots before all others, which every query sees, whatever its document or window."""

    inner: SequenceLayout | None = None
    prefix: int = 0

    @property
    def mask(self) -> Tensor:
        """See ``SequenceLayout``; always written out."""
        return self.visible

    @property
    def visible(self) -> Tensor:
        """[B or 1, 1, S, P + L] bool."""
        assert self.inner is not None
        visible = self.inner.visible
        return torch.cat((visible.new_ones(*visible.shape[:-1], self.prefix), visible), dim=-1)


class PrefixAttention(nn.Module):
    """Attention whose queries also see P trained keys and values a head. They have no position.

    Sliding windows and documents do not hide them, and the cache does not hold them.
    """

    keys: Tensor
    """[P, G, d]"""
    values: Tensor
    """[P, G, d]"""

    def __init__(self, base: Attention, config: PrefixConfig, std: float, name: str, seed: int) -> None:
        super().__init__()
        if isinstance(base, ChunkedAttention | RelativeAttention):
            raise ValueError(
                "finetune.prefix: attention in chunks of positions, or biased by them, has no place for keys without "
                "one; use finetune.lora"
            )
        self.base = base
        shape = (config.length, base.num_kv_heads, base.head_dim)
        for part in ("keys", "values"):
            parameter = nn.Parameter(base.k_proj.weight.new_empty(shape))
            with torch.no_grad(), torch.device("cpu"):
                for index, values in initial_values(f"{name}.{part}", parameter.shape, seed, std, range(0)):
                    parameter[index].copy_(values)
            self.register_parameter(part, parameter)

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        last: int | None = None,
    ) -> Tensor:
        """See ``Attention``."""
        base, asking = self.base, layout.last(last)
        q, k, v = base.project(x, last)
        q, k = base.place(q, k, asking, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layout.past, k, v)
        k, v = self._before(self.keys, k), self._before(self.values, v)
        out: Tensor = base.o_proj(base.attend(q, k, v, self._seen(asking.within(base.window))).flatten(-2))
        return out

    def new_cache(self, batch_size: int, max_length: int) -> LayerCache:
        """See ``Attention``."""
        return self.base.new_cache(batch_size, max_length)

    def _before(self, prefix: Tensor, of_text: Tensor) -> Tensor:
        """[P, G, d] before [B, G, L, d] → [B, G, P + L, d]."""
        first = prefix.transpose(0, 1).to(of_text.dtype).expand(len(of_text), -1, -1, -1)
        return torch.cat((first, of_text), dim=2)

    def _seen(self, layout: SequenceLayout) -> SequenceLayout:
        """The prefix counts as cached: it is before the new tokens, and not one of them."""
        given = {field.name: getattr(layout, field.name) for field in fields(SequenceLayout)}
        prefix = len(self.keys)
        return _PrefixedLayout(**given | {"past": layout.past + prefix}, inner=layout, prefix=prefix)
