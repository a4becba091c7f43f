import pytest
import torch

import tiny
from ildistil import Distiller, init_student, objectives
from ildistil.training.monitor import Throughput, peak_memory
from test_distiller import loader, trainer


def test_throughput_counts_real_tokens_only() -> None:
    teacher = tiny.bert(4)
    meter = Throughput()
    run = trainer(objectives.LogitsKL(), meter, max_epochs=1)
    run.fit(Distiller(init_student(teacher, layers=[1]), teacher), loader(rows=16))
    assert int(meter._tokens) == sum(3 + i % 5 for i in range(16))
    assert float(run.callback_metrics["train/tokens_per_second"]) == pytest.approx(int(meter._tokens) / meter._seconds)


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**28 // 4)  # a quarter GiB
    assert peak_memory(torch.device("cpu")) >= max(before, held.numel() * 4 / 2**30)
