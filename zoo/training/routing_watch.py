"""Watching the routers while they train: a warning when routing collapses, and pictures of the load for TensorBoard.

Shapes: E experts, K top-k.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from zoo.moe.stats import DECIDABLE, dead_experts, effective_experts, expert_load
from zoo.training.logs import ExpertLoad
from zoo.training.module import ZooModule

ONSET, RECOVERY = 0.25, 0.5
"""Routing of a layer has collapsed once its spread falls below the first, until it rises above the second: so that one
collapse is one warning, however the load wavers about a threshold."""

PICTURE_INTERVALS = 10
"""Logging intervals from one picture of the load to the next; it takes a tenth of a second."""


def spread(load: Tensor, top_k: int) -> float:
    """load [E] → (effective experts - K) / (E - K): 1 is uniform, 0 is all tokens on the same K experts."""
    least, most = top_k, load.shape[-1]
    return (float(effective_experts(load)) - least) / (most - least) if most > least else 1.0


class CollapseDetector:
    """Which layers' routing has collapsed, from the counts of one interval after the other.

    Args:
        top_k: K, experts of a token.
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.collapsed: set[int] = set()
        """Layers."""

    def update(self, counts: Mapping[int, Tensor]) -> tuple[list[int], list[int]]:
        """counts [E] by layer of one interval → (layers that have just collapsed, layers that have just recovered).

        A layer whose experts have fewer than ``DECIDABLE`` assignments on average stays what it was.
        """
        told = {i: spread(expert_load(c), self.top_k) for i, c in counts.items() if c.double().mean() >= DECIDABLE}
        fallen = [layer for layer, value in told.items() if value < ONSET and layer not in self.collapsed]
        risen = [layer for layer, value in told.items() if value > RECOVERY and layer in self.collapsed]
        self.collapsed = (self.collapsed | set(fallen)) - set(risen)
        return fallen, risen


class RoutingWatch(Callback):
    """Warns on standard error when the routing of a layer collapses, with the usual remedy, and when it has recovered.

    ``router/collapsed_layers``, their number, joins the module's metrics. During the warm-up of the learning rate, when
    routers have learned nothing yet, nothing is said. Now and then the load of every expert goes to TensorBoard as a
    heat map.

    Args:
        load: The callback, earlier in the list, that counts.
    """

    def __init__(self, load: ExpertLoad) -> None:
        self._load = load
        self._detector: CollapseDetector | None = None
        self._collapsed: set[int] = set()
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The layers that were warned of."""
        return {"collapsed": sorted(self._detector.collapsed if self._detector else self._collapsed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do not warn of them again."""
        self._collapsed = set(state_dict["collapsed"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up where a checkpoint left off."""
        assert isinstance(pl_module, ZooModule)
        self._last_step = trainer.global_step
        moe = pl_module.spec.model.moe
        if moe is not None:
            self._detector = CollapseDetector(moe.top_k)
            self._detector.collapsed = self._collapsed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the interval that has just ended, if one has."""
        assert isinstance(pl_module, ZooModule)
        step, counts = trainer.global_step, self._load.interval_counts
        if self._detector is None or not counts or step == self._last_step:
            return
        self._last_step = step
        if step > pl_module.schedule.warmup_steps:
            fallen, risen = self._detector.update(counts)
            if trainer.is_global_zero:
                for line in _lines(pl_module, counts, fallen, risen):
                    print(f"step {step}: {line}", file=sys.stderr)
        pl_module.step_metrics["router/collapsed_layers"] = torch.tensor(len(self._detector.collapsed))
        if (step // self._load.every_n_steps) % PICTURE_INTERVALS == 0 or step == trainer.max_steps:
            _draw(trainer, counts)


def _lines(module: ZooModule, counts: Mapping[int, Tensor], fallen: list[int], risen: list[int]) -> list[str]:
    """What there is to say of layers that have just collapsed or recovered: a line each, however many layers."""
    if fallen:
        first = f"routing collapses in {_measured(counts, fallen)}; the usual remedy: {remedy(module)}"
    return [*([first] if fallen else []), *([f"routing has recovered in {_measured(counts, risen)}"] if risen else [])]


def _measured(counts: Mapping[int, Tensor], layers: list[int]) -> str:
    parts = []
    for layer in layers:
        number = float(effective_experts(expert_load(counts[layer])))
        dead = len(dead_experts(counts[layer]) or ())
        parts.append(f"layer {layer} ({number:.1f} effective experts of {len(counts[layer])}, {dead} dead)")
    return ", ".join(parts)


def remedy(module: ZooModule) -> str:
    """What to change of the run's config."""
    moe, balance, rate = module.spec.model.moe, module.objective.load_balance_coef, module.bias_update_rate
    if balance:
        return f"raise model.load_balance_coef = {balance}, or lower model.optimizer.lr"
    if rate:
        return f"raise model.bias_update_rate = {rate}, or set model.load_balance_coef to 0.01"
    other = ", or model.bias_update_rate to 0.001" if moe is not None and moe.router_bias else ""
    return f"set model.load_balance_coef to 0.01{other}"


def _draw(trainer: Trainer, counts: Mapping[int, Tensor]) -> None:
    """The load of every expert as a heat map, to TensorBoard."""
    writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not writers or not trainer.is_global_zero:
        return
    from zoo.harness.drawing import STYLE, WIDTH, heat_map, plt

    tables = [(expert_load(c) * len(c)).tolist() for c in counts.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.26 * len(tables) + 1.5))
        heat_map(figure, [axes], [tables], [str(layer) for layer in counts])
        axes.set(ylabel="layer")
        for writer in writers:
            writer.add_figure("router/load", figure, trainer.global_step, close=False)
        plt.close(figure)
