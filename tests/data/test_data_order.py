import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ildistil.data import LengthGroupedSampler, TextData
from ildistil.data.sampler import EpochSampler, even_batch_size
from tiny_data import make_tokenizer

LENGTHS = torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0))


def padded_tokens(order: list[int], batch_size: int) -> int:
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return sum(int(LENGTHS[batch].max()) * len(batch) for batch in batches)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_is_seen(rows: int, replicas: int, evaluation: bool, grouped: bool) -> None:
    def sampler(rank: int) -> EpochSampler:
        if grouped:
            return LengthGroupedSampler(LENGTHS[:rows], 8, replicas, rank, evaluation=evaluation)
        return EpochSampler(rows, replicas, rank, evaluation=evaluation)

    shares = [list(sampler(rank)) for rank in range(replicas)]
    assert [len(share) for share in shares] == [len(sampler(rank)) for rank in range(replicas)]
    seen = sorted(row for share in shares for row in share)
    assert sorted(set(seen)) == list(range(rows))
    if evaluation:
        assert len(seen) == rows
    else:
        assert len(seen) - rows < max(replicas, 2)
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize(
    "make", [lambda **k: LengthGroupedSampler(LENGTHS, 8, **k), lambda **k: EpochSampler(1000, **k)]
)
def test_the_order_is_a_function_of_seed_and_epoch(make: Any) -> None:
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            sampler = make(seed=seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = list(sampler)
            torch.randn(3)
            assert list(sampler) == orders[seed, epoch]
    assert len({tuple(order) for order in orders.values()}) == 9  # seed 1 does not repeat the epochs of seed 0
    fixed = make(seed=0, evaluation=True)
    fixed.set_epoch(2)
    assert list(fixed) == orders[0, 0]


def test_grouping_leaves_little_padding_and_new_batches_in_every_epoch() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 8)
    first = list(sampler)
    real = int(LENGTHS.sum())
    assert padded_tokens(first, 8) - real < 0.1 * (padded_tokens(list(EpochSampler(1000)), 8) - real)
    sampler.set_epoch(1)
    second = list(sampler)
    together = [{frozenset(order[i : i + 8]) for i in range(0, 1000, 8)} for order in (first, second)]
    assert len(together[0] & together[1]) == 0
    means = torch.stack([LENGTHS[first[i : i + 8]].float().mean() for i in range(0, 1000, 8)])
    assert abs(float(torch.corrcoef(torch.stack([means[1:-1], means[2:]]))[0, 1])) < 0.3  # not sorted
    assert LENGTHS[first[:8]].max() == LENGTHS.max()


def test_ranks_get_similar_lengths_in_the_same_step() -> None:
    one, two = (list(LengthGroupedSampler(LENGTHS, 8, 2, rank)) for rank in range(2))
    apart = [abs(int(LENGTHS[one[i : i + 8]].max() - LENGTHS[two[i : i + 8]].max())) for i in range(0, 496, 8)]
    assert max(apart) <= 3


@pytest.mark.parametrize("rows", [2, 3, 5, 64, 65, 129, 872, 1043])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_ranks_have_equally_many_evaluation_batches(rows: int, replicas: int, batch_size: int) -> None:
    size = even_batch_size(rows, batch_size, replicas)
    shares = [len(EpochSampler(rows, replicas, rank, evaluation=True)) for rank in range(replicas)]
    assert len({-(-share // size) for share in shares}) == 1


def test_a_negative_seed() -> None:
    with pytest.raises(ValueError, match=r"seed .* is -1"):
        EpochSampler(3, seed=-1)


def data_of(path: Path, **settings: Any) -> TextData:
    texts = ["cat " * (1 + (i * 7) % 13) + f"the w{i}" for i in range(50)]
    file = path / "train.jsonl"
    file.write_text("\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(texts)))
    data = TextData(str(file), str(file), tokenizer=make_tokenizer(), batch_size=8, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def content(loader: Any) -> dict[int, Any]:
    return {
        int(i): (ids[mask.bool()].tolist(), int(label))
        for b in loader
        for i, ids, mask, label in zip(b["row_id"], b["input_ids"], b["attention_mask"], b["labels"], strict=True)
    }


def test_row_ids_stay_with_their_rows(tmp_path: Path) -> None:
    in_order = content(data_of(tmp_path).predict_dataloader()[0])
    assert list(in_order) == list(range(50))
    for settings in ({}, {"group_by_length": False}, {"seed": 3}, {"num_workers": 1}):
        data = data_of(tmp_path, **settings)
        assert content(data.train_dataloader()) == content(data.val_dataloader()[0]) == in_order
        assert list(content(data.train_dataloader())) != list(in_order)
    few = data_of(tmp_path, limit_train=9)
    chosen = content(few.train_dataloader())
    assert len(chosen) == 9
    assert chosen.items() <= in_order.items()
    assert chosen == content(data_of(tmp_path, limit_train=9).train_dataloader())
    assert chosen != content(data_of(tmp_path, limit_train=9, seed=1).train_dataloader())
    assert len(content(few.val_dataloader()[0])) == 50


def test_the_seed_is_seed_everythings_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int | None) -> list[int]:
        return list(data_of(tmp_path, seed=seed).train_dataloader().sampler)

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert order(None) == order(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert order(None) == order(7) != order(0)


def test_lightning_leaves_the_order_alone_under_ddp(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ddp_order.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(2)]
    for epoch in ("0", "1"):
        train = [rank["train"][epoch] for rank in ranks]
        assert sorted(row for batches in train for ids, _ in batches for row in ids) == list(range(50))
        assert all(abs(a - b) <= 3 for (_, a), (_, b) in zip(*train, strict=True))  # like lengths in the same step
        shares = [[row for ids, _ in batches for row in ids] for batches in train]
        assert shares == expected_shares(tmp_path, int(epoch))
        assert sorted(row for rank in ranks for row in rank["val"][epoch]) == list(range(33))
    assert ranks[0]["train"]["0"] != ranks[0]["train"]["1"]
    assert sorted(row for rank in ranks for row in rank["predict"]) == list(range(33))


def expected_shares(path: Path, epoch: int) -> list[list[int]]:
    lengths = json.loads((path / "lengths.json").read_text())
    samplers = [LengthGroupedSampler(lengths, 4, 2, rank, seed=5) for rank in range(2)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]
