"""Comparisons of objectives, initialisations and mappings over many runs."""
