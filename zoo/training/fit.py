"""From the arguments of ``zoo fit`` to a trained checkpoint: LightningCLI in OmegaConf mode, and the run directory."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
import warnings
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from zoo.finetune.run import Finetuning, refuse_adapted
from zoo.parallel import weights as parallel_weights
from zoo.parallel.plan import plan_names
from zoo.parallel.strategy import MoEParallelStrategy
from zoo.training import finders
from zoo.training.checkpoint import AtomicCheckpointIO, Checkpoint, RandomState
from zoo.training.data import TokenDataModule
from zoo.training.data.store import TOKENIZER_DIR
from zoo.training.logs import ExpertLoad, MetricsLog, build_loggers
from zoo.training.memory import freed_memory_kept
from zoo.training.module import ZooModule
from zoo.training.progress import TrainingProgress
from zoo.training.routing_watch import RoutingWatch
from zoo.training.run import RunDirectory
from zoo.weights import save_model

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    # The data never ends, so there are no epochs to validate after.
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    # The data module deals out the ranks' parts itself.
    "use_distributed_sampler": False,
}


class FitCLI(LightningCLI):
    """Parses the config, takes the run directory and makes module, data and trainer; a finished run makes none."""

    run_directory: RunDirectory
    model: ZooModule
    datamodule: TokenDataModule

    def __init__(self, argv: list[str]) -> None:
        super().__init__(
            ZooModule,
            TokenDataModule,
            args=argv,
            run=False,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={
                "prog": "zoo fit",
                "parser_mode": "omegaconf",
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed, that of the weights and of torch's generator."""
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of the weights.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpointing, and the seed of the weights."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_class_arguments(MoEParallelStrategy, "parallel", skip={"plan"}, instantiate=False)
        parser.add_argument(
            "--find",
            type=Literal["lr", "batch_size"] | None,
            default=None,
            help="Look for a learning rate or the largest batch size instead of training; on one device.",
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("parallel.recompute", "model.recompute")
        parser.add_argument(
            "--finetune",
            type=dict[str, Any] | None,
            default=None,
            help="What is trained of a trained model: freeze, train, lora, molora or prefix (docs/finetuning.md).",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``; mistakes are one line.

        Raises:
            ValueError: an unknown key or a value of the wrong type.
        """
        try:
            self.config: Namespace = parser.parse_args(_join_overrides(args, parser))
        except argparse.ArgumentError as error:
            raise ValueError(_explain(str(error), parser)) from None

    def before_instantiate_classes(self) -> None:
        """Take the run directory before anything is read or made.

        Raises:
            ValueError: another process owns it, or a key that a run needs is missing.
        """
        trainer = self.config.trainer
        if not trainer.default_root_dir:
            raise ValueError("trainer.default_root_dir is missing: give the run directory, for example runs/tiny")
        if trainer.max_steps < 1:
            raise ValueError(f"trainer.max_steps = {trainer.max_steps}: give the number of optimizer steps")
        self.run_directory = RunDirectory(trainer.default_root_dir, writes=getattr(rank_zero_only, "rank", 0) == 0)

    def instantiate_classes(self) -> None:
        """Make module, data and trainer."""
        if self.run_directory.finished:
            return
        super().instantiate_classes()
        if self.model.checkpoint is not None:
            refuse_adapted(self.model.checkpoint)
        if self.config.finetune is not None:
            self.model.finetuning = self._finetuning(self.config.finetune)

    def _finetuning(self, section: dict[str, Any]) -> Finetuning:
        """What the ``finetune:`` section asks for.

        Raises:
            ValueError: a mistake in it, or a model that is spread over processes.
        """
        if isinstance(self.trainer.strategy, MoEParallelStrategy):
            raise ValueError(
                "finetune: it needs trainer.strategy = auto and one device; a model spread over processes is trained "
                "as a whole"
            )
        module = self.model
        return Finetuning(section, module.spec, module.checkpoint, bool(module.bias_update_rate))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the loggers and callbacks of every run beside those of the config.

        Raises:
            ValueError: arguments that contradict each other, or a device that is not there.
        """
        config = self.config_init.trainer
        every = config.log_every_n_steps
        load = ExpertLoad(every)
        callbacks = [load, RoutingWatch(load), MetricsLog(every), RandomState()]
        if config.enable_progress_bar is not False:
            callbacks.append(TrainingProgress())
        loggers = [*build_loggers(self.run_directory.path, self.run_directory.latest_step), *_listed(config.logger)]
        if self.config_init.find is not None:
            # The Tuner saves a checkpoint to come back to.
            kwargs["default_root_dir"], loggers = str(self.run_directory.path / finders.ASIDE), []
        try:
            return super().instantiate_trainer(
                strategy=self._strategy(),
                logger=loggers,
                callbacks=[*_listed(config.callbacks), *callbacks],
                plugins=[*_listed(config.plugins), AtomicCheckpointIO()],
                **kwargs,
            )
        except MisconfigurationException as error:
            raise ValueError(f"trainer: {error}") from None

    def _strategy(self) -> MoEParallelStrategy | str:
        """What spreads the model, by the name of its plan; ``auto`` trains on one device, or copies it to several.

        Raises:
            ValueError: a strategy of another kind: it would sum neither labels nor expert counts.
        """
        config = self.config_init.trainer
        name = config.strategy
        several = config.devices not in (1, "1") or config.num_nodes > 1
        if name == "auto" and not several:
            return "auto"
        if name == "auto":
            name = "ddp"
        if not isinstance(name, str) or (name not in plan_names() and not name.endswith((".yaml", ".yml"))):
            raise ValueError(
                f"trainer.strategy = {name}: give auto, {', '.join(plan_names())}, or the YAML file of a plan"
            )
        return MoEParallelStrategy(name, **self.config_init.parallel)


def fit(argv: list[str]) -> int:
    """Train as ``argv`` says and save the model to ``final`` in the run directory; a finished run is left as it is.

    Raises:
        ValueError: a mistake in the config or in a file that it names; a loss that is not finite.
        OSError: a file cannot be read or written.
    """
    _quiet_libraries()
    cli = FitCLI(argv)
    run = cli.run_directory
    if run.finished:
        print(f"{run.path} is finished, its model is in {run.final}; train anew with another trainer.default_root_dir")
        return 0
    cli.model.check_vocabulary(cli.datamodule.tokenizer.vocab_size)
    if cli.config.find is not None:
        print(finders.find(cli.config.find, cli.trainer, cli.model, cli.datamodule, run.path))
        return 0
    latest = run.latest_checkpoint
    if run.writes:
        run.record(cli.parser.dump(cli.config, skip_unset=False), cli.config.seed_everything, run.latest_step)
        print(f"resuming {run.path} after step {run.latest_step}" if latest else f"training in {run.path}", flush=True)
    try:
        with freed_memory_kept():
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=latest, weights_only=True)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit with status 1.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if cli.config.trainer.fast_dev_run:
        return 0
    assert cli.model.model is not None
    tokenizer_dir = cli.datamodule.data_dir / TOKENIZER_DIR
    if cli.model.finetuning is not None:
        cli.model.finetuning.save(cli.model.model, run.path, run.final, tokenizer_dir)
        print(f"trained model: {run.final}")
        return 0
    save = save_model if cli.model.parallel is None else parallel_weights.save_model
    save(cli.model.model, cli.model.spec, run.final, tokenizer_dir=tokenizer_dir)
    if run.writes:
        print(f"trained model: {run.final}")
    return 0


def _join_overrides(argv: list[str], parser: LightningArgumentParser) -> list[str]:
    """``argv`` with all its ``--model.overrides.KEY VALUE`` as one value, merged into that of the configs.

    And so ``--finetune.KEY VALUE``. jsonargparse would let ``--model.overrides.moe.top_k`` replace all that a config
    says of ``moe``.
    """
    dotted: dict[str, list[str]] = {"model.overrides": [], "finetune": []}
    rest: list[str] = []
    left = iter(argv)
    for argument in left:
        field = next((field for field in dotted if argument.startswith(f"--{field}.")), None)
        if field is None:
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix(f"--{field}.").partition("=")
        dotted[field].append(f"{key}={value if equals else next(left, '')}")
    if not any(dotted.values()):
        return argv
    configured = parser.parse_args([a for a in rest if not a.startswith("--print_config")])
    for field, given in dotted.items():
        if given:
            merged = OmegaConf.merge(configured[field] or {}, OmegaConf.from_dotlist(given))
            rest += [f"--{field}", json.dumps(OmegaConf.to_container(merged))]
    return rest


def _listed(value: Any) -> list[Any]:
    """A Trainer argument that may be none, one or several, as a list; booleans are none."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _explain(message: str, parser: LightningArgumentParser) -> str:
    """A parser error in one line, with the nearest key where it names an unknown one."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|(?:Option|option) '([\w.]+)'", message)
    if not unknown:
        return message
    key = unknown[1] or unknown[2]
    group = re.search(r"Group '([\w.]+)'", message)
    if group:
        key = f"{group[1]}.{key}"
    keys = [action.dest for action in parser._actions]
    # A misspelt group is reported as each key in it.
    top = key.split(".")[0]
    key = key if top in keys else top
    keys = [known for known in keys if ("." in known) == ("." in key)]
    same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "zoo fit --help_all explains all keys"
    return f"unknown key {key!r}; {hint}"


def _quiet_libraries() -> None:
    """Leave standard error to the progress and to errors: no advertisements, no notes on what is set here anyway."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        *(".*does not have many workers.*", ".*exists and is not empty.*", ".*LeafSpec.*"),
        # The validation loss is summed over processes before it is logged.
        ".*when logging on epoch level in distributed setting.*",
        # One process reads a checkpoint of several.
        ".*assuming the intent is to load in a single process.*",
    ):
        warnings.filterwarnings("ignore", message=message)
