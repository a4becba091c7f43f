"""Which vector stands for a whole text: the state of its first token, of its last one, or the mean of all."""

from typing import Literal, get_args

from ildistil.capture import ModelInfo
from ildistil.errors import ObjectiveError
from ildistil.functional.checks import check_choice
from ildistil.functional.pooling import Pooling

__all__ = ["Pool", "checked", "pooling"]

Pool = Literal["auto", "first", "last", "mean"]


def checked(pool: Pool) -> Pool:
    """Return the option.

    Raises:
        ConfigError: there is no such pooling.
    """
    check_choice("pool", pool, get_args(Pool))
    return pool


def pooling(pool: Pool, info: ModelInfo) -> Pooling:
    """Return where a model's texts are pooled: with ``"auto"`` where its head pools them.

    That is what its config says, if it does; else the last token of a causal model, the first one of others.

    Raises:
        ObjectiveError: the first token of a causal model, which sees none but itself.
    """
    if pool == "auto":
        return info.pooling or ("last" if info.causal else "first")
    if pool == "first" and info.causal:
        raise ObjectiveError(
            f"pool='first': the {info.name} is causal, so its first token sees no other and says the same of all texts "
            "that begin alike. Use pool='auto', which takes the last token, or pool='mean'."
        )
    return pool
