"""lm-eval's own command line with our model registered: ``python -m zoo.harness run --model zoo --tasks boolq …``."""

from lm_eval.__main__ import cli_evaluate

import zoo.harness.lm  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
