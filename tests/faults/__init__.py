"""Experiments that try to lose a run's work, or to change its result without a word: ``python -m faults --help``."""
