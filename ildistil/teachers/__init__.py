"""What answers for the teacher: a model that runs, or what it said before, stored.

A folder of targets holds, for each row of a data set, what the objectives read of the teacher: hidden states, queries,
keys and values of mapped layers, logits, outputs of modules. Rows are found by what the teacher would read, so that
shuffling, padding, resuming and several processes don't matter, and a changed row is an error. :func:`precompute` makes
a folder, :class:`StoredTeacher` reads it in the teacher's place.
"""

from ildistil.teachers.live import LiveTeacher
from ildistil.teachers.precompute import Estimate, estimate, precompute
from ildistil.teachers.stored import StoredTeacher
from ildistil.teachers.teacher import Teacher

__all__ = ["Estimate", "LiveTeacher", "StoredTeacher", "Teacher", "estimate", "precompute"]
