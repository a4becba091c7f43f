"""Targets of a teacher, stored once and read in every epoch: the teacher then need not run, nor be there.

A folder of targets holds, for each row of a data set, what the objectives read of the teacher: hidden states, queries,
keys and values of mapped layers, logits, outputs of modules. Rows are found by what the teacher would read, so that
shuffling, padding, resuming and several processes don't matter, and a changed row is an error. :func:`precompute` makes
a folder, :class:`StoredTeacher` takes the teacher's place, and with the teacher beside it makes what is missing along
the way.
"""

from ildistil.errors import TargetsError
from ildistil.teachers.precompute import Estimate, estimate, precompute
from ildistil.teachers.stored import StoredTeacher

__all__ = ["Estimate", "StoredTeacher", "TargetsError", "estimate", "precompute"]
