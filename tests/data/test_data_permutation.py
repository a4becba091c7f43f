"""A shuffle without memory is a permutation, and a random one."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from ildistil.data.hashing import draw, keys, uniform
from ildistil.data.permutation import Permutation
from ildistil.data.sampler import EpochSampler


def order(rows: int, *seed: int) -> list[int]:
    return Permutation(rows, seed)(np.arange(rows)).tolist()


@pytest.mark.parametrize("rows", [*range(1, 35), 97, 127, 128, 129, 1000, 1024, 4099, 65536, 100_003])
def test_every_row_has_one_place(rows: int) -> None:
    for seed in (0, 7):
        assert sorted(order(rows, seed, 1)) == list(range(rows))


def test_it_depends_on_seed_and_epoch_only() -> None:
    orders = {str(order(100, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    shuffle = Permutation(10**9 + 7, [3, 4])
    places = np.array([5, 10**9, 0, 77])
    assert shuffle(places).tolist() == [int(shuffle(place)[0]) for place in places[:, None]]
    assert shuffle(places).max() < 10**9 + 7


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_all_orders_are_equally_frequent(rows: int) -> None:
    found = Counter(tuple(order(rows, seed, 0)) for seed in range(4000))
    counts = [found[each] for each in itertools.permutations(range(rows))]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("rows", [37, 64, 1000])
def test_places_and_neighbours_are_uniform(rows: int) -> None:
    """Where a row goes, and how far apart rows that were neighbours are then, in many epochs."""
    orders = np.array([order(rows, 1, epoch) for epoch in range(600)])
    bins = min(rows, 50)
    for row in (0, rows // 2, rows - 1):
        counts = np.bincount(np.nonzero(orders == row)[1] * bins // rows, minlength=bins)
        expected = np.bincount(np.arange(rows) * bins // rows) * len(orders) / rows
        assert stats.chisquare(counts, expected).pvalue > 1e-4
    steps = np.bincount((np.diff(orders, axis=1) % rows).ravel(), minlength=rows)[1:]
    assert stats.chisquare(steps).pvalue > 1e-4
    assert abs(stats.spearmanr(orders[0], orders[1]).statistic) < 4 / rows**0.5


def test_hundreds_of_millions_of_rows_take_neither_time_nor_memory() -> None:
    sampler = EpochSampler(200_000_000, num_replicas=8, rank=3, seed=1)
    sampler.go_on(2, 12_345_678)
    start = time.perf_counter()
    rows = list(itertools.islice(sampler, 20_000))
    assert time.perf_counter() - start < 2
    assert len(set(rows)) == 20_000
    places = 3 + 8 * np.arange(12_345_678, 12_345_678 + 20_000)
    assert rows == Permutation(200_000_000, [1, 2])(places).tolist()


@pytest.mark.parametrize("shares", [(1, 12), (2, 6), (3, 4), (4, 3)])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(shares: tuple[int, int]) -> None:
    """And its order goes on wherever it was left, on any number of ranks."""
    replicas, batch = shares
    (whole,) = [list(EpochSampler(100, seed=5))]
    ranks = [EpochSampler(100, replicas, rank, seed=5) for rank in range(replicas)]
    for step in (0, 1, 5):
        for sampler in ranks:
            sampler.go_on(0, step * batch)
        mine = [list(itertools.islice(sampler, batch)) for sampler in ranks]
        assert sorted(row for rows in mine for row in rows) == sorted(whole[12 * step : 12 * step + 12])


def test_the_numbers_are_uniform_and_unrelated() -> None:
    """Bits of neighbouring places, rows and epochs."""
    rows, places = np.arange(300, dtype=np.uint64)[:, None], np.arange(300, dtype=np.uint64)
    streams = [draw(draw(keys([0, epoch]), rows), places) for epoch in range(2)]
    for numbers in map(uniform, streams):
        assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-4
        for shifted in (numbers[1:, :], numbers[:, 1:]):
            assert (
                abs(np.corrcoef(numbers[: shifted.shape[0], : shifted.shape[1]].ravel(), shifted.ravel())[0, 1]) < 0.02
            )
    assert abs(np.corrcoef(*(uniform(each).ravel() for each in streams))[0, 1]) < 0.02
    bits = np.unpackbits(streams[0].view(np.uint8), axis=-1).mean(axis=(0, 1))
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / 90_000**0.5 + 0.002
    assert torch.tensor(streams[0].view(np.int64)).unique().numel() == 90_000
