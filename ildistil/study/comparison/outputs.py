"""Internal: what models say of the rows of a set, each reading with its own tokenizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel

from ildistil.capture import ModelInfo
from ildistil.capture.inputs import model_inputs, real_labels
from ildistil.capture.run import model_errors
from ildistil.data.task import Task, task_of
from ildistil.data.tokenizing import tokenizer_digest
from ildistil.errors import DataError, ModelError, NotFiniteError
from ildistil.metrics import IGNORED
from ildistil.students.tokenizers import load_tokenizer

__all__ = ["Batches", "Outputs", "Reading", "Split", "find_set", "first_set", "outputs", "prepared"]

Split = Literal["validation", "test"]
Batches = Any  # a loader


@dataclass(frozen=True)
class Reading:
    """A model, its name, and the batches of the set as it reads them."""

    name: str
    path: str
    model: PreTrainedModel
    info: ModelInfo
    batches: Batches


@dataclass(frozen=True)
class Outputs:
    """Logits of all rows with a label, in the order of their ids, and the inputs of some.

    Attributes:
        ids: ``(rows,)``.
        logits: ``(rows, outputs)``, float32.
        labels: ``(rows,)``.
        sample: Inputs of single rows, without padding: the same rows of all models.
    """

    ids: Tensor
    logits: Tensor
    labels: Tensor
    sample: list[dict[str, Tensor]] = field(default_factory=list)


class _Reader(L.LightningModule):
    """What a data module learns the tokenizer from."""

    def __init__(self, tokenizer_source: str) -> None:
        super().__init__()
        self.tokenizer_source = tokenizer_source


def prepared(data: L.LightningDataModule, trainer: L.Trainer, path: str, name: str, model: PreTrainedModel) -> Batches:
    """Return the batches of a set as a model reads them.

    Args:
        data: Follows the tokenizer of the model that runs, or has the one that all models share.
        trainer: Runs nothing, but says which device and stage it is.
        path: Of the model and its tokenizer.
        name: Of the set.
        model: The model.

    Raises:
        DataError: There is no such set, or its tokenizer isn't the model's.
    """
    split, number = find_set(task_of(data), name)
    reader = _Reader(path)
    trainer.strategy.connect(reader)
    trainer.state.fn = TrainerFn.VALIDATING if split == "validation" else TrainerFn.TESTING
    trainer.datamodule = data  # type: ignore[attr-defined]
    data.trainer = reader.trainer = trainer
    data.prepare_data()
    data.setup("validate" if split == "validation" else "test")
    _check_tokenizer(task_of(data), path, model)
    loaders = data.val_dataloader() if split == "validation" else data.test_dataloader()
    return loaders[number] if isinstance(loaders, list | tuple) else loaders


def find_set(task: Task, name: str) -> tuple[Split, int]:
    """Return whether a set is of validation or test, and its number among these."""
    of_split: dict[Split, list[str]] = {"validation": task.validation_names, "test": task.test_names}
    for split, names in of_split.items():
        if name in names:
            return split, names.index(name)
    known = [each for names in of_split.values() for each in names]
    raise DataError(f"The data has no set {name!r}. Its sets: {', '.join(known)}.")


def _check_tokenizer(task: Task, path: str, model: PreTrainedModel) -> None:
    used = task.tokenizer
    if used is None:
        return
    vocabulary = ModelInfo.of(model).vocabulary
    if vocabulary is not None and len(used) > vocabulary:
        raise DataError(
            f"The data's tokenizer has {len(used):,} words, the model {path!r} {vocabulary:,}. Let each model read "
            "with its own: leave out --data.tokenizer."
        )
    try:
        own = load_tokenizer(path)
    except DataError:
        return  # it has none: the data's is all there is
    if tokenizer_digest(own) != tokenizer_digest(used):
        raise DataError(
            f"The data is read with another tokenizer ({used.name_or_path!r}) than the model's own ({path!r}), which "
            "would make it look worse than it is. Leave out --data.tokenizer, so that each model reads the texts with "
            "its own; with a data module of your own, take the tokenizer from trainer.lightning_module."
            "tokenizer_source."
        )


@torch.inference_mode()
def outputs(reading: Reading, device: torch.device, sample: int) -> Outputs:
    """Run a model over all rows.

    Args:
        reading: The model and its batches.
        device: To run on.
        sample: Rows to keep the inputs of.

    Raises:
        DataError: There are no rows, or they have no labels.
        ModelError: It has no prediction a row.
        NotFiniteError: Logits are NaN.
    """
    model = reading.model.to(device).eval()
    ids, logits, labels, kept = [], [], [], dict[int, dict[str, Tensor]]()
    seen = 0
    for batch in reading.batches:
        labelled = move_data_to_device(real_labels(batch), device)
        if labelled.get("labels") is None:
            raise DataError("The set has no labels, so there is nothing to compare models by. Choose one that has.")
        inputs = {key: value for key, value in model_inputs(model, labelled).items() if key != "labels"}
        with model_errors(reading.name, inputs):
            found = model(**inputs).logits.float().cpu()
        if found.ndim != 2:
            raise ModelError(
                f"{reading.name} gives logits of the shape {tuple(found.shape)}. Models with one prediction a row can "
                "be compared."
            )
        rows = labelled.get("row_id", torch.arange(seen, seen + len(found))).cpu()
        seen += len(found)
        ids.append(rows)
        logits.append(found)
        labels.append(labelled["labels"].cpu())
        kept = dict(sorted((kept | dict(_single_rows(rows, inputs))).items(), key=_drawn)[:sample])
    if not seen:
        raise DataError("The set is empty. Choose one with rows.")
    joined = Outputs(torch.cat(ids), torch.cat(logits), torch.cat(labels))
    if joined.logits.isnan().any():
        raise NotFiniteError(f"Logits of {reading.name} are NaN for some rows. Look for NaN in its weights.")
    real = torch.ones_like(joined.ids, dtype=torch.bool)
    if not joined.labels.is_floating_point():
        real = joined.labels != IGNORED
    order = joined.ids.argsort(stable=True)
    order = order[real[order]]
    return Outputs(joined.ids[order], joined.logits[order], joined.labels[order], list(kept.values()))


def _drawn(item: tuple[int, object]) -> tuple[int, int]:
    """Return a row's place in a random order that is the same for all models."""
    return item[0] * 2_654_435_761 % 2**32, item[0]


def _single_rows(ids: Tensor, inputs: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield each row's inputs, without the columns that are padding."""
    tensors = {name: value.cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
    mask = tensors.get("attention_mask")
    for number, row in enumerate(ids.tolist()):
        one = {name: value[number : number + 1] for name, value in tensors.items()}
        if mask is not None:
            real = mask[number] != 0
            one = {name: value[:, real] if value.shape[1:2] == real.shape else value for name, value in one.items()}
        yield row, one


def first_set(task: Task) -> str:
    """Return the name of the set that is measured where none is named.

    Raises:
        DataError: There is none.

    >>> from ildistil.data import Glue
    >>> first_set(task_of(Glue("mnli")))
    'val'
    """
    names = task.validation_names or task.test_names
    if not names:
        raise DataError("The data has no validation set and no test set, so there is nothing to compare models on.")
    return names[0]
