"""Upcycling: a dense checkpoint as the beginning of a sparse model (arXiv 2212.05055)."""

from __future__ import annotations

from zoo.upcycle.layout import derive, layout
from zoo.upcycle.weights import Recipe, Upcycled, upcycle

__all__ = ["Recipe", "Upcycled", "derive", "layout", "upcycle"]
