"""Which vector stands for a whole text: the state of its first token, of its last one, or the mean of all."""

from typing import Literal, get_args

from ildistil.capture import Activations
from ildistil.errors import ObjectiveError
from ildistil.functional.checks import check_choice
from ildistil.functional.pooling import Pooling

Pool = Literal["auto", "first", "last", "mean"]


def checked(pool: Pool) -> Pool:
    """Return the option, if there is such a pooling."""
    check_choice("pool", pool, get_args(Pool))
    return pool


def pooling(pool: Pool, run: Activations) -> Pooling:
    """Return where a model's texts are pooled: with ``"auto"`` where its head pools them, see :class:`Activations`."""
    if pool == "auto":
        return run.pooling
    if pool == "first" and run.causal:
        raise ObjectiveError(
            "pool='first': the model is causal, so its first token sees no other and says the same of all texts that "
            "begin alike. Use pool='auto', which takes the last token, or pool='mean'."
        )
    return pool
