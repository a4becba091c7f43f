from ildistil.kernels.scores import Masks, Scores
from ildistil.kernels import blockwise
