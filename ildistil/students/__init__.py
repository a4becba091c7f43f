"""Where students come from: layers of a teacher or another checkpoint, as wide or narrower, or random weights."""

from ildistil.students.initialise import init_student
from ildistil.students.sources import ModelSource, StudentOptions, load, pretrained

__all__ = ["ModelSource", "StudentOptions", "init_student", "load", "pretrained"]
