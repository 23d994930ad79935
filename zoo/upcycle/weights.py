"""The weights of a sparse model from those of a dense one, and how far its first forward is from the dense model's.

Shapes: B batch, S sequence, D model, F dense FFN, M expert, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo.accounting import count_parameters
from zoo.config import CONFIG_FILE, ModelConfig, ModelSpec, load_spec, save_spec
from zoo.encoder_decoder_config import decoder_spec
from zoo.model import initial_values
from zoo.upcycle.layout import Layout, layout
from zoo.weights.convert import buffer_names, open_published, open_zoo, parameter_shapes, published_directory
from zoo.weights.loading import checkpoint_directory, load
from zoo.weights.stream import Named
from zoo.weights.target import MAX_SHARD_BYTES, copy_tokenizer, new_directory, write_tensors

CHECKED_BATCH, CHECKED_LENGTH = 2, 64
"""Tokens that two models are compared on, [B, S]."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to the copies; nothing by default.

    Attributes:
        noise: Gaussian noise on every routed expert's matrices, in units of the matrix's own standard deviation.
        drop: Drop-Upcycling (arXiv 2502.19261, section 3): of every routed expert this part of the hidden units, at
            random, is drawn anew, from normal distributions with mean and standard deviation of what it replaces.
        seed: of noise, of what is dropped and of the router.

    Raises:
        ValueError: a number out of its range, or both noise and drop.
    """

    noise: float = 0.0
    drop: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise = {self.noise}: give 0 or a positive part of a matrix's standard deviation")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop = {self.drop}: give a part of the hidden units, from 0 to 1")
        if self.noise and self.drop:
            raise ValueError(f"noise = {self.noise} and drop = {self.drop}: give one of the two")

    def __str__(self) -> str:
        how = f"noise {self.noise}" if self.noise else f"drop {self.drop}" if self.drop else "copy"
        return f"{how}, seed {self.seed}"


@dataclass(frozen=True)
class Upcycled:
    """What was made, and how far its first forward is from the dense model's."""

    spec: ModelSpec
    directory: Path
    inexact: str | None
    """Why it is not equal, ``None`` where it should be up to rounding."""
    difference: float | None
    """Largest difference of two logits on random tokens in fp64, ``None`` if it was not looked at."""
    largest: float | None
    """Largest logit of the dense model there, without its sign."""

    def as_json(self) -> str:
        """One JSON object for scripts."""
        parameters = count_parameters(self.spec.model)
        return json.dumps(
            {
                "name": self.spec.name,
                "family": self.spec.family,
                "directory": str(self.directory),
                "parameters": parameters.total,
                "active": parameters.active,
                "exact": self.inexact is None,
                "inexact_because": self.inexact,
                "largest_difference": self.difference,
                "largest_logit": self.largest,
            }
        )

    def as_text(self) -> str:
        """What a person reads at the end."""
        parameters = count_parameters(self.spec.model)
        sizes = f"{parameters.total:,} parameters, {parameters.active:,} active"
        claim = "equal to the dense model's" if self.inexact is None else f"not the dense model's: {self.inexact}"
        lines = [f"{self.spec.name} ({sizes}): written to {self.directory}", f"first forward: {claim}"]
        if self.difference is not None:
            lines.append(f"largest difference of logits {self.difference:.1e}, of logits up to {self.largest:.1f}")
        return "\n".join(lines)


def upcycle(
    source: str | Path,
    target: ModelSpec,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> Upcycled:
    """Make the zoo checkpoint ``out`` of the sparse model ``target`` from a dense one; one FFN is held at a time.

    Args:
        source: of the dense model, as for ``zoo.load``: zoo checkpoint, directory in a published layout, name, hub id.
        target: the sparse model, from ``derive`` perhaps.
        out: directory to make, in the dtype of the source, with its tokenizer.
        recipe: what is done to the copies; by default nothing.
        check: load both models, in fp64, and compare their logits on random tokens.
        max_shard_bytes: size of the files written.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: the two do not fit, there is nothing to load, or ``out`` exists.
        OSError: ``out`` cannot be written.
    """
    recipe, directory = recipe or Recipe(), checkpoint_directory(source)
    with open_dense(directory) as (dense, tensors), new_directory(Path(out)) as aside:
        try:
            plan = layout(dense.model, target.model)
        except ValueError as error:
            raise ValueError(f"{target.name} from {dense.name}: {error}") from None
        copy_tokenizer(directory, aside, target.model.vocab_size)
        maker = _Maker(target.model, plan, recipe)
        write_tensors(aside, maker.tensors(_tracked(tensors, dense.model, progress)), max_shard_bytes)
        origin = f"{dense.name} upcycled ({recipe})"
        spec = ModelSpec(name=target.name, family=target.family, model=target.model, reference=origin)
        save_spec(spec, aside / CONFIG_FILE)
        difference, largest = first_forward(directory, aside, recipe.seed) if check else (None, None)
    changed = f"{recipe}" if recipe.noise or recipe.drop else None
    return Upcycled(spec, Path(out), plan.inexact or changed or maker.rounding, difference, largest)


@contextmanager
def open_dense(directory: Path) -> Iterator[tuple[ModelSpec, Named]]:
    """The decoder in a zoo checkpoint or published directory, and its tensors in the order of its state."""
    if (directory / CONFIG_FILE).is_file():
        spec = load_spec(directory / CONFIG_FILE)
        with open_zoo(directory, parameter_shapes(spec.model)) as source:

            def read() -> Named:
                for name in parameter_shapes(spec.model):
                    yield name, source.read(name)
                    source.close()  # the pages of an open file count as ours

            yield spec, read()
    else:
        with open_published(published_directory(directory)) as (any_spec, stream):
            yield decoder_spec(any_spec), (pair for group in stream.groups() for pair in group)


def _tracked(tensors: Named, config: ModelConfig, show: bool) -> Named:
    from rich.console import Console
    from rich.progress import track

    total, console = len(parameter_shapes(config)), Console(stderr=True)
    yield from track(tensors, "upcycling", total=total, console=console, disable=not show, transient=True)


class _Maker:
    """The tensors of the sparse model from those of the dense one."""

    def __init__(self, config: ModelConfig, plan: Layout, recipe: Recipe) -> None:
        assert config.moe is not None
        self._config, self._moe, self._plan, self._recipe = config, config.moe, plan, recipe
        self._shapes = parameter_shapes(config)
        self._buffers = buffer_names(config)
        self.rounding: str | None = None
        """What half precision takes from the first forward, once tensors are made."""

    def tensors(self, dense: Named) -> Named:
        """All tensors in the order of the model's state, from the dense model's in the order of its own."""
        ffn: dict[str, Tensor] = {}
        for name, tensor in dense:
            if name in self._shapes:
                yield name, tensor
                continue
            block, _, matrix = name.partition(".ffn.")
            ffn[matrix.removesuffix("_proj.weight")] = tensor
            if len(ffn) == 3:
                yield from self._moe_tensors(f"{block}.ffn.", **ffn)
                ffn = {}

    def _moe_tensors(self, prefix: str, gate: Tensor, up: Tensor, down: Tensor) -> Named:
        """All of one MoE layer from gate, up [F, D] and down [D, F]."""
        for name in [name for name in self._shapes if name.startswith(prefix)]:
            shape = self._shapes[name]
            match name.removeprefix(prefix).split("."):
                case ["experts", "gate_up"]:
                    yield name, self._gate_up(prefix, gate.new_empty(shape), gate, up)
                case ["experts", "down"]:
                    yield name, self._down(prefix, down.new_empty(shape), down)
                case ["shared_experts", "gate_proj", _]:
                    yield name, gate[: shape[0]]
                case ["shared_experts", "up_proj", _]:
                    yield name, up[: shape[0]]
                case ["shared_experts", "down_proj", _]:
                    yield name, down[:, : shape[1]] * self._plan.shared_scale
                case ["shared_expert_gate", _]:
                    yield name, gate.new_zeros(shape)
                case _ if name in self._buffers:
                    yield name, torch.zeros(shape)  # in fp32, whatever the model is in
                case _:
                    yield name, self._router(name).to(gate.dtype)

    def _gate_up(self, prefix: str, stacked: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        for expert, units in self._experts():
            stacked[expert, 0] = self._vary(gate[units], f"{prefix}experts.gate", expert)
            stacked[expert, 1] = self._vary(up[units], f"{prefix}experts.up", expert)
        return stacked

    def _down(self, prefix: str, stacked: Tensor, down: Tensor) -> Tensor:
        scale = self._plan.routed_scale
        if down.element_size() < 4 and math.frexp(scale)[0] != 0.5:  # no power of two
            self.rounding = (
                f"outputs of experts times {scale:g} are rounded to {str(down.dtype).removeprefix('torch.')}; "
                f"moe.routed_scaling_factor = {self._moe.routed_scaling_factor * scale:g} would leave them as they are"
            )
        for expert, units in self._experts():
            varied = self._vary(down[:, units].T, f"{prefix}experts.down", expert)
            stacked[expert] = varied.T * scale
        return stacked

    def _experts(self) -> Iterator[tuple[int, slice]]:
        """Every routed expert, with the hidden units of the dense FFN that it holds."""
        width = self._moe.moe_intermediate_size
        for expert in range(self._moe.num_experts):
            start = (self._plan.first_routed + expert % self._plan.routed) * width
            yield expert, slice(start, start + width)

    def _vary(self, matrix: Tensor, key: str, expert: int) -> Tensor:
        """One matrix [M, D] of an expert, a row for each hidden unit, after the recipe."""
        recipe = self._recipe
        if recipe.noise:
            normal = self._normal(key, expert, matrix.shape)
            return matrix + recipe.noise * matrix.float().std() * normal
        if recipe.drop:
            # The same units of all three matrices.
            order = self._normal(f"{key.rpartition('.')[0]}.order", expert, matrix.shape[:1]).argsort()
            dropped = order[: max(1, round(recipe.drop * len(order)))]
            old = matrix[dropped].float()
            new = old.mean() + old.std() * self._normal(key, expert, old.shape)
            return matrix.index_copy(0, dropped, new.to(matrix.dtype))
        return matrix

    def _normal(self, key: str, expert: int, shape: torch.Size) -> Tensor:
        """N(0, 1) in fp32, of its own for every key and expert."""
        whole = torch.Size((expert + 1, *shape))
        ((_, values),) = initial_values(key, whole, self._recipe.seed, 1.0, range(expert, expert + 1))
        return values

    def _router(self, name: str) -> Tensor:
        """[E, ...], equal rows for the experts of a virtual group."""
        experts, *rest = self._shapes[name]
        rows = torch.Size((experts // self._plan.routed, *rest))
        ((_, values),) = initial_values(name, rows, self._recipe.seed, self._config.initializer_range, range(0))
        return values.repeat_interleave(self._plan.routed, dim=0)


@torch.no_grad()
def first_forward(dense: str | Path, sparse: str | Path, seed: int = 0) -> tuple[float, float]:
    """Largest difference of logits of two checkpoints, in fp64 on random tokens [B, S], and the dense one's largest.

    In fp64, as what rounding does to logits of 16 is more in fp32 than the 1e-5 that is asked for.
    """
    theirs = load(dense, dtype=torch.float64)
    length = min(CHECKED_LENGTH, theirs.config.max_position_embeddings)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(theirs.config.vocab_size, (CHECKED_BATCH, length), generator=draw)
    expected = theirs(tokens).logits
    del theirs  # before the larger one is loaded
    return float((load(sparse, dtype=torch.float64)(tokens).logits - expected).abs().max()), float(expected.abs().max())
