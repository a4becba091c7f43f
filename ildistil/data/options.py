"""Options of loading that all data modules of this library share."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ildistil.errors import DataError


@dataclass(frozen=True)
class LoadingOptions:
    """How rows are tokenised, batched and ordered: the options that all data modules of this library take by name.

    Args:
        tokenizer: A folder, a hub name or a loaded tokenizer; None takes that of the model the Trainer runs.
        batch_size: Rows per batch and process in training; None is 32.
        tokens_per_batch: Instead of ``batch_size``: tokens per batch and process in training, padding included. A batch
            has as many rows of similar length as fit.
        eval_batch_size: Rows per batch and process otherwise; None is ``batch_size``.
        max_length: Rows are cut to this many tokens.
        group_by_length: Batches hold rows of similar length (else: any rows, and the file's order in evaluation).
        seed: Seed of the order and of the rows ``limit_train`` keeps; None is that of ``seed_everything``, else 0.
        num_workers: Worker processes per data loader. The rows are tokenised already: 0 is mostly fastest.
        cache_dir: Folder of the cache; None is ``$ILDISTIL_CACHE`` or ``~/.cache/ildistil``.
        limit_train: Train on at most this many rows, drawn at random with the seed.

    Raises:
        DataError: A number is too small or not whole, the tokenizer is of another type, or ``tokens_per_batch`` is
            given together with ``batch_size`` or without ``group_by_length``.
    """

    tokenizer: str | PreTrainedTokenizerBase | None = None
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    eval_batch_size: int | None = None
    max_length: int = 128
    group_by_length: bool = True
    seed: int | None = None
    num_workers: int = 0
    cache_dir: str | None = None
    limit_train: int | None = None

    def __post_init__(self) -> None:
        optional = ("batch_size", "tokens_per_batch", "eval_batch_size", "limit_train", "seed")
        for name in (*optional, "max_length", "num_workers"):
            value, least = getattr(self, name), int(name not in ("seed", "num_workers"))
            if (value is not None or name not in optional) and (type(value) is not int or value < least):
                raise DataError(f"{name} is {value!r}; it must be a whole number, at least {least}.")
        if not isinstance(self.tokenizer, str | PreTrainedTokenizerBase | None):
            raise DataError(f"tokenizer is {self.tokenizer!r:.80}; name a folder or model, or pass a loaded tokenizer.")
        if self.tokens_per_batch is not None and self.batch_size is not None:
            raise DataError(
                f"batch_size={self.batch_size} and tokens_per_batch={self.tokens_per_batch} both say how large a batch "
                "is in training. Leave one of them out, or set it to null. eval_batch_size is that of evaluation."
            )
        if self.tokens_per_batch is not None and not self.group_by_length:
            raise DataError("tokens_per_batch makes batches of rows of similar length: leave out group_by_length.")
