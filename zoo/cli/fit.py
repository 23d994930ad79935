"""``zoo fit``: train a model from a config."""

from __future__ import annotations

HELP = """usage: zoo fit --config FILE [--KEY VALUE ...]

Train a model from a config. A value on the command line replaces the config's; several configs are merged in order.
Running the same command again goes on from the latest checkpoint, also after kill -9, with the same losses as if the
run had never stopped.

what is trained:
  --model.name NAME                  a name of `zoo list`, a model YAML, or a checkpoint directory to train on from
  --model.overrides.FIELD VALUE      change a field of the model, such as --model.overrides.num_layers 4
  --model.load_balance_coef X        weight of the load-balance loss, taken per --model.balance_scope
  --model.balance_scope SCOPE        micro_batch, sequence, or global_batch
  --model.device_balance_coef X      weight of the device-level balance loss, and --model.communication_balance_coef X
  --model.z_loss_coef X              weight of the router z-loss
  --model.bias_update_rate X         step of the selection bias of loss-free balancing
                                     a weight is a number, or a ramp: '{start: 0.01, end: 0, to_step: 1000}'
  --finetune CONFIG                  of a trained model: a part or adapter (docs/finetuning.md): '{train: [experts]}',
                                     '{freeze: [router]}', '{lora: {targets: [experts, attention], rank: 8}}'
  --seed_everything N                seed of the weights

on what, how long:
  --data.data_dir DIR                what `zoo data build` wrote
  --data.sequence_length N           tokens in an example
  --data.batch_size N                examples in a micro-batch
  --data.seed N                      seed of the order of the examples
  --trainer.max_steps N              optimizer steps
  --trainer.accumulate_grad_batches N  micro-batches in an optimizer step
  --trainer.precision P              32-true, bf16-mixed or bf16-true; routers stay fp32
  --model.optimizer.lr X             peak learning rate, and --model.optimizer.name adamw or muon
  --model.schedule.shape SHAPE       cosine or wsd, with --model.schedule.warmup_steps N and .decay_steps N

on several devices (docs/parallel.md):
  --trainer.devices N                processes of this machine; the batch size counts the examples of all together
  --trainer.strategy PLAN            ddp, fsdp, ep, ep_fsdp, tp_ep_fsdp, or the YAML file of a plan
  --parallel.expert N                ranks over which the experts are spread, --parallel.tensor N that share a batch

  --model.ema_decay X                average the weights, with this decay a step
  --parallel.recompute WHAT          none, experts or block: compute their activations again instead of keeping them
  --find WHAT                        lr or batch_size: look for one to begin with instead of training

that does not die:
  --model.max_skipped_steps N        steps in a row that may be skipped because they are not finite
  --model.spikes CONFIG              skip loss spikes as well: '{threshold: 6, window: 100, max_in_a_row: 5}'

where to:
  --trainer.default_root_dir DIR     run directory; the trained model goes to DIR/final
  --trainer.log_every_n_steps N      steps between two lines of DIR/metrics.csv
  --trainer.val_check_interval N     micro-batches between two validations
  --checkpoint.every_n_steps N       optimizer steps between two checkpoints

  --print_config                     print all keys as they would be used, and stop
  --help_all                         explain all keys, Lightning's Trainer included

example:
  zoo data build --tokenizer tokenizer.model --out data/stories stories.txt
  zoo fit --config configs/train/mixtral-tiny.yaml --data.data_dir data/stories --trainer.default_root_dir runs/stories
  zoo generate runs/stories/final --prompt 'Once upon a time'"""


def run_argv(argv: list[str]) -> int:
    """Train as ``argv`` says. Help is answered here, because importing Lightning takes seconds.

    Raises:
        ValueError: a mistake in the config or in a file that it names.
        OSError: a file cannot be read or written.
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP)
        return 0
    from zoo.training.fit import fit

    return fit(["--help" if argument == "--help_all" else argument for argument in argv])
