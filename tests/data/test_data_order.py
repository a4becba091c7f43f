import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import ddp_order
from ildistil.data import LengthGroupedSampler, TextData, TokenBudgetSampler
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
    "make",
    [
        lambda **k: LengthGroupedSampler(LENGTHS, 8, **k),
        lambda **k: EpochSampler(1000, **k),
        lambda **k: TokenBudgetSampler(LENGTHS, 300, **k),
    ],
)
def test_the_order_is_a_function_of_seed_and_epoch(make: Any) -> None:
    orders: dict[tuple[int, int], list[Any]] = {}
    for seed in range(3):
        for epoch in range(3):
            sampler = make(seed=seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = list(sampler)
            torch.randn(3)
            assert list(sampler) == orders[seed, epoch]
    assert len({str(order) for order in orders.values()}) == 9  # seed 1 does not repeat the epochs of seed 0


@pytest.mark.parametrize("make", [lambda: LengthGroupedSampler(LENGTHS, 8, evaluation=True),
                                  lambda: EpochSampler(1000, evaluation=True)])  # fmt: skip
def test_evaluation_ignores_the_epoch(make: Any) -> None:
    sampler = make()
    first = list(sampler)
    sampler.set_epoch(2)
    assert list(sampler) == first


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


def budget_batches(lengths: torch.Tensor, budget: int, replicas: int = 1, epoch: int = 0) -> list[list[list[int]]]:
    """The batches of each rank."""
    shares = []
    for rank in range(replicas):
        sampler = TokenBudgetSampler(lengths, budget, replicas, rank)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return shares


def size(batch: list[int], lengths: torch.Tensor = LENGTHS) -> int:
    return len(batch) * int(lengths[batch].max())


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 999, 1000])
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("budget", [60, 177, 1000, 10**6])
def test_a_token_budget_is_kept_and_every_row_seen(rows: int, replicas: int, budget: int) -> None:
    lengths = LENGTHS[:rows]
    for epoch in range(2):
        shares = budget_batches(lengths, budget, replicas, epoch)
        assert len({len(share) for share in shares}) == 1
        assert all(0 < size(batch) <= budget for share in shares for batch in share)
        seen = sorted(row for share in shares for batch in share for row in batch)
        assert sorted(set(seen)) == list(range(rows))
        assert len(seen) - rows < replicas


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_epochs_of_a_token_budget_are_equally_long(replicas: int) -> None:
    shapes = []
    for epoch in range(5):
        shares = budget_batches(LENGTHS, 300, replicas, epoch)
        shapes.append([sorted(len(batch) for batch in share) for share in shares])
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_token_budget_is_filled_with_new_batches_in_every_epoch(replicas: int) -> None:
    first, second = (budget_batches(LENGTHS, 512, replicas, epoch) for epoch in range(2))
    padded = sum(size(batch) for share in first for batch in share)
    assert padded < 1.07 * int(LENGTHS.sum())
    assert sum(map(len, first)) <= 1.1 * padded / 512 + 2 * replicas
    together = [{frozenset(batch) for share in shares for batch in share} for shares in (first, second)]
    assert len(together[0] & together[1]) == 0
    for step in zip(*first, strict=True):
        longest = [int(LENGTHS[batch].max()) for batch in step]
        assert max(longest) - min(longest) <= 5
        assert max(map(len, step)) - min(map(len, step)) <= 1
    own = [float(LENGTHS[batch].float().mean()) for batch in first[0][2:]]
    assert float(torch.corrcoef(torch.tensor([own[:-1], own[1:]]))[0, 1]) < 0.5  # not sorted


def test_the_biggest_batches_of_a_token_budget_come_first() -> None:
    lengths = torch.cat([torch.tensor([70]), torch.full((50,), 20), torch.full((90,), 3)])
    (batches,) = budget_batches(lengths, 100)
    assert size(batches[0], lengths) == max(size(batch, lengths) for batch in batches) == 100
    assert int(lengths[batches[1]].max()) == 70


def test_a_row_that_exceeds_the_token_budget() -> None:
    with pytest.raises(
        ValueError, match=r"A row has 59 tokens, and tokens_per_batch is 58\. Raise it to 59 or more, or"
    ):
        TokenBudgetSampler(LENGTHS, 58)


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
    sizes = {} if "tokens_per_batch" in settings else {"batch_size": 8}
    data = TextData(str(file), str(file), tokenizer=make_tokenizer(), **sizes, **settings)
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
    for settings in ({}, {"group_by_length": False}, {"seed": 3}, {"num_workers": 1}, {"tokens_per_batch": 40}):
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


def test_batches_of_a_token_budget(tmp_path: Path) -> None:
    data = data_of(tmp_path, tokens_per_batch=64, limit_train=40)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(batch["input_ids"].numel() <= 64 for batch in batches)
    assert sum(len(batch["row_id"]) for batch in batches) == 40
    assert {key: value.dtype for key, value in batches[0].items()} == {
        key: value.dtype for key, value in next(iter(data.val_dataloader()[0])).items()
    }
    assert data.val_dataloader()[0].batch_size == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"tokens_per_batch": 64, "batch_size": 8}, "batch_size=8 and tokens_per_batch=64 both say how large"),
        ({"tokens_per_batch": 64, "group_by_length": False}, "leave out group_by_length"),
    ],
)
def test_impossible_token_budgets_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextData("train.csv", **settings)


def test_a_fit_with_a_token_budget(tmp_path: Path) -> None:
    data = data_of(tmp_path, tokens_per_batch=40)
    module = ddp_order.Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = L.Trainer(max_epochs=2, accelerator="cpu", **quiet)
    run.fit(module, data.train_dataloader())
    assert run.global_step == run.estimated_stepping_batches == 2 * len(data.train_dataloader())
    epochs = [[ids for ids, _ in module.seen["train"][epoch]] for epoch in range(2)]
    assert epochs[0] == list(data.train_dataloader().sampler)
    assert epochs[0] != epochs[1]  # the epoch's number has reached the sampler
    with pytest.raises(ValueError, match=r"overfit_batches .* Use batch_size with it"):
        L.Trainer(max_epochs=1, accelerator="cpu", overfit_batches=1, num_sanity_val_steps=0, **quiet).fit(
            ddp_order.Recorder(), data
        )


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
    lengths = json.loads((tmp_path / "lengths.json").read_text())
    for run in ("grouped", "budget"):
        ranks = [json.loads((tmp_path / f"{run}{rank}.json").read_text()) for rank in range(2)]
        for epoch in ("0", "1"):
            train = [rank["train"][epoch] for rank in ranks]
            assert sorted(row for batches in train for ids, _ in batches for row in ids) == list(range(50))
            assert all(abs(a - b) <= 3 for (_, a), (_, b) in zip(*train, strict=True))  # like lengths in the same step
            assert sorted(row for rank in ranks for row in rank["val"][epoch]) == list(range(33))
            samplers = [ddp_order.sampler(run, lengths, rank) for rank in range(2)]
            for batches, expected in zip(train, samplers, strict=True):
                expected.set_epoch(int(epoch))
                own = [ids for ids, _ in batches]
                assert (own if run == "budget" else [row for ids in own for row in ids]) == list(expected)
        assert ranks[0]["train"]["0"] != ranks[0]["train"]["1"]
        assert sorted(row for rank in ranks for row in rank["predict"]) == list(range(33))
