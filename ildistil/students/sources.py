"""Where models come from, in types that a YAML file can name."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from ildistil.errors import ModelError
from ildistil.students.initialise import init_student
from ildistil.students.narrow import Width

__all__ = ["ModelSource", "StudentOptions", "load", "pretrained"]

Head = Literal["sequence-classification", "masked-lm", "causal-lm", "none"]
_AUTO: dict[Head, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "none": "AutoModel",
}


class ModelSource(ABC):
    """Where a model comes from; subclass it to name your own in a YAML file."""

    @abstractmethod
    def load(self) -> PreTrainedModel:
        """Give the model."""

    @property
    def tokenizer(self) -> str | None:
        """Name or folder of the tokenizer that belongs to the model."""
        return None

    def digest(self) -> str | None:
        """Give a hash of everything the model is made of, without loading it; ``None`` where that isn't possible."""
        return None


@dataclass(frozen=True)
class pretrained(ModelSource):  # noqa: N801 (in YAML it reads as the verb it is)
    """A trained model of the hub or a local folder.

    Args:
        path: name on the hub, or a folder that ``save_pretrained`` wrote.
        head: what is on top.
        dtype: precision of the weights; half precision saves memory of a frozen teacher.
        config: values to change in the model's config, such as ``{"attention_probs_dropout_prob": 0.0}``.
    """

    path: str
    head: Head = "sequence-classification"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    config: dict[str, Any] | None = None

    def load(self) -> PreTrainedModel:
        """Load the model; every weight must be in the checkpoint."""
        return load(self.path, self.head, dtype=self.dtype, config=self.config)

    @property
    def tokenizer(self) -> str:
        """The same path."""
        return self.path

    def digest(self) -> str | None:
        """Hash the files of a folder and the options; of a model of the hub nothing is known before it is loaded."""
        folder = Path(self.path)
        files = [p for kind in ("config.json", "*.safetensors", "*.bin") for p in sorted(folder.glob(kind))]
        if not files:
            return None
        digest = hashlib.sha256(repr((self.head, self.dtype, self.config)).encode())
        for path in files:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class StudentOptions:
    """Where the student comes from.

    Args:
        layers: teacher layers to start from, numbered ``1..L``.
        path: instead: another pretrained model, by name or folder.
        config: values to change in the teacher's config; without ``layers`` the student starts at random
            (``{num_hidden_layers: 3}``).
        width: ``importance`` makes the student narrower by ``config`` (``{hidden_size: 256, ...}``), from the teacher's
            largest weights. ``pca`` needs calibration batches, which only ``init_student`` in Python takes.
        source: with ``layers``: another checkpoint of the teacher's architecture that they come from, by name or
            folder, such as the pretrained model before fine-tuning.
    """

    layers: list[int] | None = None
    path: str | None = None
    config: dict[str, Any] | None = None
    width: Width | None = None
    source: str | None = None

    @property
    def copies_weights(self) -> bool:
        """Whether the student starts from weights of the teacher."""
        return self.path is None and (self.layers is not None or self.width is not None)

    def make(self, teacher: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
        """Give the student for a teacher."""
        if self.path is None:
            return self._from_teacher(teacher, source)
        if self.layers is not None:
            raise ModelError("A student has either layers (of the teacher) or a path (of another model), not both.")
        if self.width is not None or self.source is not None:
            raise ModelError("A student with a path is that model as it is: leave out width and source, or the path.")
        if source.tokenizer is not None:
            _check_tokenizers(self.path, source.tokenizer)
        head: Head = next((h for h, a in _AUTO.items() if _has_head(teacher, a)), "none")
        labels = {"num_labels": teacher.config.num_labels, "id2label": teacher.config.id2label}
        labels |= {"label2id": teacher.config.label2id, "problem_type": teacher.config.problem_type}
        return load(self.path, head, config=labels | (self.config or {}), new_head=True).train()

    def _from_teacher(self, teacher: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
        if self.width == "pca":
            raise ModelError(
                "width: pca needs calibration batches, which a YAML file can't give. Use width: importance, or make "
                "the student in Python with init_student(teacher, ..., width='pca', batches=[...]), save it with "
                "save_pretrained and name its folder as path."
            )
        if self.source is None:
            return init_student(teacher, self.layers, self.config, width=self.width)
        if source.tokenizer is not None:
            _check_tokenizers(self.source, source.tokenizer)
        other = _without_random_weights(self.source)
        return init_student(teacher, self.layers, self.config, width=self.width, source=other)


def load(
    path: str,
    head: Head = "sequence-classification",
    *,
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
    new_head: bool = False,
) -> PreTrainedModel:
    """Load a transformers model by name or folder, and make sure that no weight of it is random.

    Args:
        path: name on the hub, or a folder.
        head: what is on top.
        dtype: precision of the weights.
        config: values to change in the config.
        new_head: allow a head whose weights are not in the checkpoint, as for fine-tuning.

    Raises:
        ModelError: the folder or the name doesn't exist, or weights are missing from the checkpoint.
    """
    _check_folder(path)
    auto = getattr(transformers, _AUTO[head])
    try:
        model, info = auto.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True, **(dict(config) if config else {})
        )
    except OSError as error:
        raise ModelError(
            f"The model {path!r} could not be loaded. Name a folder made by save_pretrained, or a model of the hub "
            f"(which needs a connection): {error}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing and not new_head:
        raise ModelError(
            f"The checkpoint {path!r} has no weights for {', '.join(missing[:4])}: its head would be random. Fine-tune "
            "it on the task first (ildistil finetune), or choose the head it was saved with."
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _without_random_weights(path: str) -> PreTrainedModel:
    """Load a checkpoint's body: with its pooler if it has one, else as the masked language model it is."""
    with torch.random.fork_rng(devices=[]):
        try:
            return load(path, "none")
        except ValueError as error:
            try:
                return load(path, "masked-lm")
            except ValueError:
                raise error from None


def _check_folder(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        parent = Path(path).parent
        near = sorted(p.name for p in parent.iterdir() if p.is_dir())[:8] if parent.is_dir() else []
        raise ModelError(f"There is no folder {path!r}. Folders beside it: {', '.join(near) or 'none'}.")


def _has_head(model: PreTrainedModel, auto: str) -> bool:
    mapping = getattr(transformers, auto)._model_mapping
    return type(model.config) in mapping and isinstance(model, mapping[type(model.config)])


def _check_tokenizers(student: str, teacher: str) -> None:
    mine, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (student, teacher))
    if mine != theirs:
        example = next((w for w in theirs if mine.get(w) != theirs[w]), next(iter(mine)))
        raise ModelError(
            f"The tokenizers of student ({student}) and teacher ({teacher}) differ: {example!r} is {mine.get(example)} "
            f"in one and {theirs.get(example)} in the other. Both models must read the same token ids; choose a "
            "student with the teacher's tokenizer."
        )
