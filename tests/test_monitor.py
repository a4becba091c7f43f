import pytest
import torch
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import tiny
from ildistil import Distiller, init_student, objectives
from ildistil.training import Throughput, peak_memory
from test_distiller import loader, trainer


def test_throughput_counts_real_tokens_only() -> None:
    teacher = tiny.bert(4)
    meter = Throughput()
    run = trainer(objectives.LogitsKL(), meter, max_epochs=1)
    run.fit(Distiller(init_student(teacher, layers=[1]), teacher), loader(rows=16))
    assert int(meter._counts["tokens"]) == sum(3 + i % 5 for i in range(16))
    assert float(run.callback_metrics["train/tokens_per_second"]) == pytest.approx(
        int(meter._counts["tokens"]) / meter._seconds
    )


def test_images_are_counted_as_examples() -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    teacher = ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4))
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 2)} for i in range(6)]
    run = trainer(objectives.LogitsKL(), Throughput(), max_epochs=1)
    run.fit(Distiller(init_student(teacher, layers=[1]), teacher), DataLoader(rows, 2))
    assert float(run.callback_metrics["train/examples_per_second"]) > 0
    assert "train/tokens_per_second" not in run.callback_metrics


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**28 // 4)  # a quarter GiB
    assert peak_memory(torch.device("cpu")) >= max(before, held.numel() * 4 / 2**30)
