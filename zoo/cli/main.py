"""The ``zoo`` command: a table of subcommands, each in a module of its own that is imported only when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import zoo

COMMANDS = {
    "fit": ("zoo.cli.fit", "train a model from a config"),
    "data": ("zoo.cli.data", "tokenise text into training data; train a tokenizer"),
    "import": ("zoo.cli.import_", "convert published weights into a zoo checkpoint"),
    "export": ("zoo.cli.export", "convert a zoo checkpoint into the published layout"),
    "upcycle": ("zoo.cli.upcycle", "make a sparse checkpoint of a dense one"),
    "verify": ("zoo.cli.verify", "check a checkpoint directory without loading it"),
    "generate": ("zoo.cli.generate", "continue a prompt"),
    "eval": ("zoo.cli.eval", "score a checkpoint on lm-eval tasks"),
    "compare": ("zoo.cli.compare", "train and evaluate the models of a study, write a report"),
    "claims": ("zoo.cli.claims", "put claims of the literature to the test"),
    "release": ("zoo.cli.release", "make a checkpoint of the zoo from a model of a finished study"),
    "match": ("zoo.cli.match", "find the dense twin of a sparse model"),
    "list": ("zoo.cli.list_", "list the models of the zoo"),
    "plan": ("zoo.cli.plan", "how to spread a model over GPUs: memory, traffic and time of every layout"),
    "inspect": ("zoo.cli.inspect", "what the routers of a sparse model do with a text"),
    "card": ("zoo.cli.card", "sizes and costs of a model, from its config alone"),
    "diff": ("zoo.cli.diff", "how two architectures differ, as a table"),
    "bench": ("zoo.cli.bench", "our times beside those of peers and of the limit"),
    "new-family": ("zoo.cli.new_family", "begin a family from the config.json of a published model"),
}
"""Command → (module, one-line help). A module has ``add_arguments(parser)`` and ``run(args) -> int``; ``fit``, whose
arguments LightningCLI parses, has ``run_argv(argv) -> int`` instead."""

USER_ERRORS = (ValueError, OSError)
"""What a user's mistake raises: printed as one line. Anything else is a bug and keeps its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 1 findings, 2 a mistake in the input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        return _without_command(arguments)
    try:
        code = _run(arguments[0], arguments[1:])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `zoo list | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get("ZOO_TRACEBACK"):
            raise
        return _fail(" ".join(str(error).split()) or type(error).__name__)


def _run(command: str, argv: list[str]) -> int:
    module = importlib.import_module(COMMANDS[command][0])
    if hasattr(module, "run_argv"):
        return int(module.run_argv(argv))
    parser = _Parser(prog=f"zoo {command}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(argv)))


class _Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line in the style of every other error."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(f"{message}; see {self.prog} --help"))


def _without_command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"zoo {zoo.__version__}")
        return 0
    close = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}"
    return _fail(f"unknown command {arguments[0]!r}; {hint}")


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: zoo [--version] [--help] COMMAND ...

Mixture-of-experts language models and their dense twins: load, train, evaluate, compare.

commands:
{commands}

`zoo COMMAND --help` explains each, with an example.

example:
  zoo card mixtral-8x7b

A mistake in the input is reported in one line; set ZOO_TRACEBACK=1 to see where it was raised."""


def _fail(message: str) -> int:
    print(f"zoo: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
