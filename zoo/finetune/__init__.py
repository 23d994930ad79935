"""Training a part of a trained decoder, or a small adapter beside it: docs/finetuning.md."""
