import os

# Before transformers is imported: nothing in the tests may ask the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# LightningCLI calls jsonargparse's instantiate by its old name.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lightning  # noqa: F401 (at its import its logger takes standard error, which must not be a test's captured one)
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Two workers on two cores: one thread each.
    torch.set_num_threads(1)
    for ignored in (
        # Lightning 2.6 asks torch 2.13's pytree in a way it deprecates.
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
        # Ten batches a run are what tests are made of.
        r"ignore:The number of training batches .* is smaller than the logging interval",
        r"ignore:You defined a `validation_step` but have no `val_dataloader`",
        r"ignore:The '.*_dataloader' does not have many workers",
        # Small random students do.
        r"ignore:The student predicts one class for all",
        r"ignore:LightningCLI's args parameter is intended",
    ):
        config.addinivalue_line("filterwarnings", ignored)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a page's example chose for the whole process."""
    monkeypatch.setattr("ildistil.kernels.choice._told", None)
