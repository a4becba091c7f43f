"""Masked tokens, drawn by their place: the same on any number of processes and workers, and when a run goes on."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ildistil.data.hashing import U64, draw, keys, uniform
from ildistil.errors import DataError
from ildistil.metrics import IGNORED

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Of the tokens to predict, these shares are replaced by the mask token and by a random token; the rest is kept.
_MASKED, _RANDOM = 0.8, 0.1


@dataclass(frozen=True, eq=False)
class Masking:
    """Choose tokens of a row for the model to predict, as BERT does, as a function of (seed, epoch, row).

    Of a row's tokens that aren't special, a share is chosen: ``probability`` times their number, rounded up or down at
    random so that the expected number is exact, and at least one. Of the chosen tokens 80 % become the mask token, 10 %
    a random token that isn't special, and 10 % stay. With whole words the share is one of words, each with equal
    chances; all tokens of a chosen word are chosen, and each of them is then masked, replaced or kept by itself, as in
    BERT's own whole word masking.

    Args:
        mask_token: Id of the mask token.
        words: Ids of the tokens that may replace others, in ascending order.
        vocabulary: Whether each id, up to the highest, may be chosen.
        probability: Share of the tokens, or words, to choose.
        whole_words: Choose words.
        seed: Seed, not negative.

    Devlin et al., BERT: Pre-training of deep bidirectional transformers, 2019 (arXiv:1810.04805).
    """

    mask_token: int
    words: Ints
    vocabulary: Bools
    probability: float = 0.15
    whole_words: bool = False
    seed: int = 0

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15, whole_words: bool = False, seed: int = 0
    ) -> Self:
        """Return the masking of a tokenizer's rows.

        Raises:
            DataError: It has no mask token.
        """
        check_mask_token(tokenizer)
        special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        words = np.array(sorted({*tokenizer.get_vocab().values()} - special), dtype=np.int64)
        vocabulary = np.zeros(max(len(tokenizer), *special, *words[-1:]) + 1, dtype=bool)
        vocabulary[words] = True
        return cls(tokenizer.mask_token_id, words, vocabulary, probability, whole_words, seed)

    def __call__(
        self, input_ids: Ints, real: Bools, rows: Ints, epochs: Ints, word_starts: Bools | None = None
    ) -> tuple[Ints, Ints]:
        """Return what the model sees, and the labels: the tokens to predict, and -100 elsewhere.

        Args:
            input_ids: Token ids, batch x length.
            real: Which of them are no padding. A row may be padded on either side: its tokens count from the first.
            rows: Number of each row in the corpus.
            epochs: Epoch of each row.
            word_starts: Where words begin; needed for whole words.
        """
        streams = self._streams(rows, epochs)[:, None]
        places = (np.cumsum(real, axis=1) - 1).astype(np.uint64) * np.uint64(3)
        allowed = real & self.vocabulary[np.where(real, input_ids, 0)]
        starts = allowed
        if self.whole_words:
            assert word_starts is not None
            # What follows a special token, or the start of the row, begins a word: no word goes on across it.
            after = np.pad(allowed, ((0, 0), (1, 0)))[:, :-1]
            starts = allowed & (word_starts | ~after)
        # The first number of a row's stream rounds, and each token has three.
        chosen = allowed & self._chosen(starts, draw(streams, places + np.uint64(1)), uniform(draw(streams, _ZERO)))
        fate, other = uniform(draw(streams, places + np.uint64(2))), draw(streams, places + np.uint64(3))
        replaced = np.where(fate < _MASKED, self.mask_token, self.words[other % np.uint64(len(self.words))])
        seen = np.where(chosen & (fate < _MASKED + _RANDOM), replaced, input_ids)
        return seen, np.where(chosen, input_ids, IGNORED)

    def _streams(self, rows: Ints, epochs: Ints) -> U64:
        """Return the key of each row's random numbers."""
        of_epochs, which = np.unique(epochs, return_inverse=True)
        found = np.concatenate([keys([self.seed, epoch]) for epoch in of_epochs.tolist()])
        return draw(found[which], rows.astype(np.uint64))

    def _chosen(self, starts: Bools, lots: U64, rounding: NDArray[np.float64]) -> Bools:
        """Choose a share of the units that begin at ``starts``: those with the lowest lots. A unit lasts to the next.

        Args:
            starts: Where units begin, batch x length.
            lots: Random numbers, batch x length; those at the starts count.
            rounding: A random number for each row, batch x 1.
        """
        units = starts.sum(axis=1, keepdims=True)
        share = self.probability * units
        wanted = np.floor(share + rounding).astype(np.int64).clip(np.minimum(1, units), units)
        lots = np.where(starts, lots, _LARGEST)
        last = np.take_along_axis(np.sort(lots, axis=1), np.maximum(wanted - 1, 0), axis=1)
        chosen: Bools = starts & (lots <= last) & (wanted > 0)
        if not self.whole_words:
            return chosen
        begun = np.maximum.accumulate(np.where(starts, np.arange(starts.shape[1]), 0), axis=1)
        whole: Bools = np.take_along_axis(chosen, begun, axis=1)
        return whole


def check_mask_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a mask token.

    Raises:
        DataError: It has none.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path!r} has no mask token, which labels='masked' needs. Use "
            "labels='next' for a causal language model, labels='none' where no term reads labels, or name the "
            "tokenizer of a masked language model."
        )


_ZERO = np.zeros(1, dtype=np.uint64)
_LARGEST = np.uint64(2**64 - 1)
