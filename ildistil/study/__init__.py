"""Comparisons of objectives, initialisations and mappings over many runs."""

from ildistil.study import statistics

__all__ = ["statistics"]
