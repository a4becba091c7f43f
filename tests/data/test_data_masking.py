"""Masked tokens: shares, words, and that nothing but (seed, epoch, row) decides them."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from corpora import tokenizer
from ildistil.data.masking import Masking
from ildistil.errors import DataError

MASKING = Masking.of(tokenizer(), seed=3)
MASK, CLS, SEP, UNK = (tokenizer().convert_tokens_to_ids(token) for token in ("[MASK]", "[CLS]", "[SEP]", "[UNK]"))
WORD_IDS = MASKING.words


def batch(rows: int = 400, length: int = 64, seed: int = 0) -> NDArray[np.int64]:
    ids = np.random.default_rng(seed).choice(WORD_IDS, (rows, length))
    ids[:, 0], ids[:, -1] = CLS, SEP
    return ids


def masked(masking: Masking, ids: Any, epoch: int = 0, first: int = 0, starts: Any = None, real: Any = None) -> Any:
    rows = np.arange(first, first + len(ids))
    return masking(ids, np.ones(ids.shape, dtype=bool) if real is None else real, rows, rows * 0 + epoch, starts)


M64 = 2**64 - 1


def splitmix(state: int, number: int) -> int:
    """The number-th output after a state, as the paper's code has it."""
    z = state
    for _ in range(number + 1):
        z = (z + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def by_hand(masking: Masking, ids: list[int], epoch: int, row: int, starts: list[bool] | None) -> tuple[Any, Any]:
    """One row, in a loop over words."""
    key = int(np.random.SeedSequence([masking.seed, epoch]).generate_state(1, np.uint64)[0])
    stream = splitmix(key, row)
    special = set(tokenizer().all_special_ids)
    units: list[list[int]] = []
    for i, token in enumerate(ids):
        if token not in special:
            goes_on = starts is not None and not starts[i] and i > 0 and ids[i - 1] not in special
            units[-1:] = [[*units[-1], i]] if goes_on else [*units[-1:], [i]]
    share = masking.probability * len(units)
    wanted = min(len(units), max(1, int(share + (splitmix(stream, 0) >> 11) / 2**53)))
    chosen = sorted(units, key=lambda unit: splitmix(stream, 3 * unit[0] + 1))[:wanted]
    seen, labels = list(ids), [-100] * len(ids)
    for i in (i for unit in chosen for i in unit):
        labels[i] = ids[i]
        fate = (splitmix(stream, 3 * i + 2) >> 11) / 2**53
        if fate < 0.8:
            seen[i] = MASK
        elif fate < 0.9:
            seen[i] = int(WORD_IDS[splitmix(stream, 3 * i + 3) % len(WORD_IDS)])
    return seen, labels


@pytest.mark.parametrize("whole_words", [False, True])
def test_against_a_loop(whole_words: bool) -> None:
    masking = Masking.of(tokenizer(), 0.3, whole_words, seed=11)
    ids = batch(6, 24)
    ids[:, 9], ids[1, 5], ids[2, 1:-1] = SEP, UNK, SEP
    starts = np.random.default_rng(1).random(ids.shape) < 0.5
    seen, labels = masked(masking, ids, epoch=2, first=40, starts=starts if whole_words else None)
    for i, row in enumerate(ids.tolist()):
        expected = by_hand(masking, row, 2, 40 + i, starts[i].tolist() if whole_words else None)
        assert (seen[i].tolist(), labels[i].tolist()) == expected


def test_the_shares_are_those_of_bert() -> None:
    """15 % of the tokens; of these 80 % masked, 10 % random, 10 % kept; whatever the length of the row."""
    for length in (9, 14, 40, 65):
        ids = batch(3000, length)
        seen, labels = masked(MASKING, ids)
        targets = labels != -100
        assert (labels[targets] == ids[targets]).all()
        assert (seen[~targets] == ids[~targets]).all()
        assert not targets[:, [0, -1]].any()
        per_row = targets.sum(axis=1)
        assert per_row.min() >= 1
        share = 0.15 * (length - 2)
        assert set(per_row) <= {int(share), int(share) + 1}
        assert abs(per_row.mean() - share) < 5 * per_row.std() / 3000**0.5 + 1e-9
        # Each place is as likely as another.
        assert stats.chisquare(targets[:, 1:-1].sum(axis=0)).pvalue > 1e-4
        kinds = [(seen[targets] == MASK).sum(), (seen[targets] == ids[targets]).sum()]
        total = targets.sum()
        again = 0.1 / len(WORD_IDS)  # a random token may be the one it replaces
        counts, shares = [*kinds, total - sum(kinds)], np.array([0.8, 0.1 + again, 0.1 - again])
        assert stats.chisquare(counts, shares * total).pvalue > 1e-4


def test_random_tokens_are_any_but_special_ones() -> None:
    ids = batch(4000, 64)
    seen, labels = masked(MASKING, ids)
    replaced = seen[(labels != -100) & (seen != MASK) & (seen != ids)]
    assert set(replaced.tolist()) <= set(WORD_IDS.tolist())
    assert stats.chisquare(np.bincount(replaced, minlength=WORD_IDS.max() + 1)[WORD_IDS]).pvalue > 1e-4
    assert not set(WORD_IDS.tolist()) & set(tokenizer().all_special_ids)


def test_nothing_but_seed_epoch_and_row_decides() -> None:
    ids = batch(20, 32)
    seen, labels = masked(MASKING, ids, epoch=1)
    for i in (0, 7, 19):  # alone, padded on either side
        row = np.arange(i, i + 1)
        for sides in ((0, 9), (9, 0)):
            padded = np.pad(ids[i : i + 1], ((0, 0), sides))
            real = np.pad(np.ones((1, 32), dtype=bool), ((0, 0), sides))
            alone = MASKING(padded, real, row, row * 0 + 1)
            assert alone[0][real].tolist() == seen[i].tolist()
            assert alone[1][real].tolist() == labels[i].tolist()
            assert (alone[1][~real] == -100).all()
    mixed = MASKING(ids, np.ones_like(ids, dtype=bool), np.arange(20), np.arange(20) % 3)  # epochs in one batch
    assert mixed[1][1::3].tolist() == labels[1::3].tolist()
    others = [masked(MASKING, ids, epoch=0), masked(MASKING, ids, epoch=1, first=1),
              masked(Masking.of(tokenizer(), seed=4), ids, epoch=1)]  # fmt: skip
    assert all((other[1] != labels).any(axis=1).mean() > 0.8 for other in others)


def test_masks_of_epochs_and_rows_are_independent() -> None:
    ids = batch(2000, 34)
    first, second = (masked(MASKING, ids, epoch=epoch)[1][:, 1:-1] != -100 for epoch in range(2))
    for one, other in ((first, second), (first[1:], first[:-1])):
        table = [[(one & other).sum(), (one & ~other).sum()], [(~one & other).sum(), (~one & ~other).sum()]]
        assert stats.chi2_contingency(table).pvalue > 1e-4


def test_whole_words_are_chosen_together_and_with_equal_chances() -> None:
    masking = Masking.of(tokenizer(), whole_words=True)
    ids = batch(4000, 42)
    starts = np.zeros(ids.shape, dtype=bool)
    words = [1, 3, 2, 4] * 4  # tokens of each word
    bounds = np.cumsum([1, *words])
    starts[:, bounds[:-1]] = True
    seen, labels = masked(masking, ids, starts=starts)
    targets = labels != -100
    per_word = np.stack([targets[:, a:b] for a, b in itertools.pairwise(bounds) if b - a == 4])
    assert (per_word.all(axis=-1) == per_word.any(axis=-1)).all()
    assert stats.chisquare(targets[:, bounds[:-1]].sum(axis=0)).pvalue > 1e-4
    assert abs(targets.sum() / (4000 * 40) - 0.15) < 0.005
    words_of_three = seen[:, bounds[1] : bounds[2]][targets[:, bounds[1]]]
    assert set((words_of_three == MASK).sum(axis=1).tolist()) == {0, 1, 2, 3}  # each token by itself


def test_rows_of_few_tokens() -> None:
    ids = np.array([[CLS, WORD_IDS[0], SEP], [CLS, UNK, SEP], [CLS, SEP, SEP]])
    labels = masked(MASKING, ids)[1]
    assert labels.tolist() == [[-100, WORD_IDS[0], -100], [-100] * 3, [-100] * 3]
    everything = masked(Masking.of(tokenizer(), probability=1.0), batch(5))[1]
    assert (everything[:, 1:-1] != -100).all()


def test_a_tokenizer_without_a_mask_token() -> None:
    with pytest.raises(DataError, match="has no mask token, which labels='masked' needs. Use labels='next'"):
        Masking.of(tokenizer(mask_token=None))
