"""Plans: which module of a decoder is placed how, as data (``configs/plans/*.yaml``).

A rule is a glob over names. ``*`` stands for one part of a dotted name, ``{a,b}`` for either. Rules are strict: one
that matches nothing is an error unless it is marked optional (families differ in the blocks they have), and so is a
parameter that two rules shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from zoo.config_reading import from_dict, load_yaml
from zoo.moe.experts import StackedExperts
from zoo.parallel.mesh import MeshSizes
from zoo.registry import configs_dir

Style = Literal["colwise", "rowwise", "per_head", "shared_key"]


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """How modules are split over the tensor ranks.

    Styles: ``colwise`` and ``rowwise`` split a linear layer by its output or its input features (arXiv 1909.08053);
    ``per_head`` keeps a norm whole that runs over the local heads, and sums its gradient; ``shared_key`` keeps MLA's
    latent projection whole and sums the gradient of its rotary key, which every head uses.
    """

    modules: str
    style: Style
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertRule:
    """How stacked expert parameters are split: dimension ``expert`` over the expert ranks, ``shard`` by FSDP."""

    parameters: str
    expert: int
    shard: int
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout.

    Attributes:
        data: What data ranks do with parameters unless sizes say otherwise: ``replicate`` them (DDP) or ``shard`` them
            (FSDP).
        units: Modules whose parameters FSDP gathers and frees together; what is outside belongs to the root.
        experts: Rules for expert parameters; they live in the sparse view of the ranks.
        tensor: Rules for the tensor ranks.
        full_precision: Modules that keep fp32 parameters when the others compute in half precision.
    """

    data: Literal["replicate", "shard"]
    units: tuple[str, ...]
    experts: tuple[ExpertRule, ...] = ()
    tensor: tuple[TensorRule, ...] = ()
    full_precision: tuple[str, ...] = ()

    def sizes(
        self, world: int, *, pipeline: int = 1, tensor: int = 1, expert: int = 1, replicate: int | None = None
    ) -> MeshSizes:
        """Mesh sizes for ``world`` ranks; ``replicate`` data ranks hold copies (hybrid sharding), the others shard.

        Raises:
            ValueError: a size that the plan has no rule for, or that does not divide the world.
        """
        if tensor > 1 and not self.tensor:
            raise ValueError(f"tensor = {tensor}: this plan splits nothing over tensor ranks; use tp_ep_fsdp, or 1")
        if expert > 1 and not self.experts:
            raise ValueError(f"expert = {expert}: this plan spreads no experts; use ep, ep_fsdp or tp_ep_fsdp, or 1")
        if pipeline < 1 or world % pipeline:
            raise ValueError(f"pipeline = {pipeline}: it must divide the {world} processes")
        stage = world // pipeline
        if tensor < 1 or stage % tensor:
            of_a_stage = " of a stage" if pipeline > 1 else ""
            raise ValueError(f"tensor = {tensor}: it must divide the {stage} processes{of_a_stage}")
        data = stage // tensor
        if replicate is None:
            replicate = data if self.data == "replicate" else 1
        if replicate < 1 or data % replicate:
            raise ValueError(f"replicate = {replicate}: it must divide the {data} data ranks")
        return MeshSizes(
            pipeline=pipeline, data_replicate=replicate, data_shard=data // replicate, tensor=tensor, expert=expert
        )


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan with its globs replaced by the names of one model."""

    units: tuple[str, ...]
    experts: dict[str, ExpertRule]
    """Parameter name → rule."""
    tensor: dict[str, Style]
    """Module name → style."""
    full_precision: tuple[str, ...]

    def within(self, part: nn.Module) -> ResolvedPlan:
        """The same of what ``part`` of the model has, under the names of the whole."""
        modules, parameters = dict(part.named_modules()), dict(part.named_parameters())
        return ResolvedPlan(
            tuple(name for name in self.units if name in modules),
            {name: rule for name, rule in self.experts.items() if name in parameters},
            {name: style for name, style in self.tensor.items() if name in modules},
            tuple(name for name in self.full_precision if name in modules),
        )


def plan_names() -> list[str]:
    """Names of the plans that come with the zoo, sorted."""
    return sorted(path.stem for path in (configs_dir() / "plans").glob("*.yaml"))


def load_plan(name_or_path: str | Path) -> Plan:
    """A plan by name or from a YAML file.

    Raises:
        ValueError: no such plan, or a file that is not one.
    """
    if str(name_or_path) in plan_names():
        path = configs_dir() / "plans" / f"{name_or_path}.yaml"
    elif Path(name_or_path).suffix in (".yaml", ".yml"):
        path = Path(name_or_path)
    else:
        raise ValueError(f"plan {str(name_or_path)!r}: give a YAML file or one of {', '.join(plan_names())}")
    return from_dict(Plan, load_yaml(path), str(path))


def resolve(plan: Plan, model: nn.Module) -> ResolvedPlan:
    """Match every rule of ``plan`` against ``model``.

    Raises:
        ValueError: a rule that matches nothing, a parameter that two rules shard, a dimension that it does not have.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = dict(model.named_parameters())
    sharded_by: dict[str, str] = {}

    def claim(parameter: str, pattern: str) -> None:
        if parameter in sharded_by:
            raise ValueError(
                f"plan: {parameter!r} is sharded twice, by {sharded_by[parameter]!r} and by {pattern!r}; remove one"
            )
        sharded_by[parameter] = pattern

    experts: dict[str, ExpertRule] = {}
    for rule in plan.experts:
        for name in _matches(rule.parameters, parameters, "parameter", rule.optional):
            claim(name, rule.parameters)
            _check_dimensions(name, parameters[name].ndim, rule)
            experts[name] = rule
    if plan.experts:
        _check_cover(experts.keys(), model)
    tensor: dict[str, Style] = {}
    for split in plan.tensor:
        for name in _matches(split.modules, modules, "module", split.optional):
            for parameter, _ in model.get_submodule(name).named_parameters(prefix=name):
                claim(parameter, split.modules)
            tensor[name] = split.style
    units = [name for pattern in plan.units for name in _matches(pattern, modules, "module")]
    twice = sorted({name for name in units if units.count(name) > 1})
    if twice:
        raise ValueError(f"plan: module {twice[0]!r} is a unit twice, in {', '.join(plan.units)}; remove one")
    full = [name for pattern in plan.full_precision for name in _matches(pattern, modules, "module", optional=True)]
    return ResolvedPlan(tuple(units), experts, tensor, tuple(full))


def _check_cover(ruled: Set[str], model: nn.Module) -> None:
    """Expert rules are for experts, and for all of them: a token must find each of its experts in one way."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, StackedExperts)]
    owned = {name for prefix, module in stacks for name, _ in module.named_parameters(prefix=prefix)}
    for name in sorted(ruled ^ owned):
        fault = "is no parameter of experts" if name in ruled else "has no rule, but the plan is to spread experts"
        raise ValueError(f"plan: {name!r} {fault}; make the rules match all experts and nothing else")


def _check_dimensions(name: str, ndim: int, rule: ExpertRule) -> None:
    for field, dim in (("expert", rule.expert), ("shard", rule.shard)):
        if not 0 <= dim < ndim:
            raise ValueError(f"plan: {rule.parameters!r}: {field} = {dim}: {name!r} has {ndim} dimensions")
    if rule.expert != 0:
        raise ValueError(f"plan: {rule.parameters!r}: expert = {rule.expert}: experts are stacked along dimension 0")
    if rule.expert == rule.shard:
        raise ValueError(f"plan: {name!r} is sharded twice along dimension {rule.shard} by {rule.parameters!r}")


def _matches(pattern: str, names: Iterable[str], kind: str, optional: bool = False) -> list[str]:
    compiled = re.compile(_regex(pattern))
    found = [name for name in names if compiled.fullmatch(name)]
    if not found and not optional:
        raise ValueError(f"plan: pattern {pattern!r} matches no {kind} of the model; correct it or mark it optional")
    return found


def _regex(pattern: str) -> str:
    out = []
    for token in re.split(r"(\*|\{[^}]*\})", pattern):
        if token == "*":
            out.append(r"[^.]+")
        elif token.startswith("{"):
            out.append("(?:" + "|".join(re.escape(part.strip()) for part in token[1:-1].split(",")) + ")")
        else:
            out.append(re.escape(token))
    return "".join(out)
