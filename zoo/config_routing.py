"""How tokens and experts find each other where it is not the router's K best, whatever their load.

Everything random is of training only; so is what sees later tokens in any ``choice`` but ``expert``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Router logits are divided by a temperature that moves linearly from ``start`` to ``end``, and stays there."""

    start: float
    end: float
    steps: int
    """Optimizer steps on the way."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Departures from token choice without limits (``zoo/moe/routers.py``, docs/routing.md)."""

    choice: Literal["token", "expert", "sinkhorn", "hash"] = "token"
    """Who chooses: a token its ``top_k`` experts (arXiv 1701.06538); an expert as many tokens of a sequence, so that a
    token has ``top_k`` in the mean (arXiv 2202.09368); a token, from a balanced transport plan while training
    (arXiv 2103.16716, 2202.01169); or a hash of the token's id (arXiv 2106.04426)."""
    capacity_factor: float | None = None
    """While training an expert takes ceil(top_k · tokens · factor / num_experts) tokens of a sequence, the first that
    choose it (arXiv 2101.03961, 2006.16668). None: all, nothing is dropped."""
    eval_capacity_factor: float | None = None
    """The same outside of training."""
    second_expert_threshold: float | None = None
    """While training, the second of two experts is used with probability min(1, weight / threshold): 0.5 in
    arXiv 2006.16668, 0.2 in arXiv 2202.08906."""
    dense_training: bool = False
    """While training, every token goes to all experts; outside of it, to ``top_k`` (arXiv 2404.05567)."""
    noise: bool = False
    """While training, logits have Gaussian noise of a learned width (arXiv 1701.06538, equations 3 to 5)."""
    jitter: float = 0.0
    """While training, each element of the router's input is multiplied with a number from 1 - jitter to 1 + jitter
    (arXiv 2101.03961, appendix C)."""
    router_dropout: float = 0.0
    """Dropout of the router's input (arXiv 2101.03961, appendix C)."""
    temperature: TemperatureConfig | None = None

    @property
    def causal(self) -> bool:
        """Whether, outside of training, no token can change what becomes of an earlier one."""
        return self.choice != "expert"

    @property
    def causal_in_training(self) -> bool:
        """The same while training."""
        return self.choice not in ("expert", "sinkhorn")

    @property
    def tokenwise(self) -> bool:
        """Whether what becomes of a token never depends on others."""
        limited = self.capacity_factor is not None or self.eval_capacity_factor is not None
        return self.choice in ("token", "hash") and not limited

    @property
    def random(self) -> bool:
        """Whether training draws numbers."""
        return bool(self.noise or self.jitter or self.router_dropout or self.second_expert_threshold)
