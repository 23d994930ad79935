"""Parallel training, applied from outside to an untouched ``zoo.model.Decoder`` (docs/parallel.md)."""
