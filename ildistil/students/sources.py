"""Where models come from, in types that a YAML file can name."""

import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ildistil import storage
from ildistil.capture.info import HEADS, classes_of
from ildistil.capture.run import model_errors
from ildistil.capture.trial import Trial, depends_on_later_tokens, undisturbed
from ildistil.errors import IldistilError, ModelError, ModelRunError
from ildistil.students.initialise import init_student
from ildistil.students.layers import changed_config
from ildistil.students.narrow import Width
from ildistil.students.tokenizers import load_tokenizer

__all__ = ["ModelSource", "StudentOptions", "load", "pretrained"]

Head = Literal["sequence-classification", "masked-lm", "causal-lm", "none"]
Dtype = Literal["float32", "bfloat16", "float16"]
_AUTO: dict[Head, Any] = {**HEADS, "none": AutoModel}


class ModelSource(ABC):
    """Where a model comes from; a subclass can be named as ``class_path`` in a YAML file.

    Only :meth:`load` must be written. ``tokenizer`` spares naming the tokenizer again, ``digest`` lets stored targets
    be used without loading the model.

    >>> class Tiny(ModelSource):
    ...     def load(self):
    ...         return transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=2))
    >>> Tiny().load().config.hidden_size
    8
    """

    @abstractmethod
    def load(self) -> PreTrainedModel:
        """Return the model, with its trained weights.

        Raises:
            ModelError: it can't be loaded.
        """

    @property
    def tokenizer(self) -> str | None:
        """Name or folder of the tokenizer that belongs to the model; ``None`` where there is none to name."""
        return None

    def digest(self) -> str | None:
        """Return a hash of all that the model is made of, without loading it; ``None`` where that isn't possible."""
        return None


@dataclass(frozen=True)
class pretrained(ModelSource):  # noqa: N801 (in YAML it reads as the verb it is)
    """A trained model of the hub or a local folder; every weight of it must be in the checkpoint.

    Code that comes with a checkpoint is never run, and weights are read from safetensors, or as weights only.

    Args:
        path: name on the hub, or a folder that ``save_pretrained`` wrote.
        head: what is on top: ``"sequence-classification"``, ``"masked-lm"``, ``"causal-lm"`` or ``"none"``.
        dtype: precision of the weights; half precision saves memory of a frozen teacher.
        config: values to change in the model's config, such as ``{"attention_probs_dropout_prob": 0.0}``. They must
            leave all shapes alone.
    """

    path: str
    head: Head = "sequence-classification"
    dtype: Dtype = "float32"
    config: dict[str, Any] | None = None

    def load(self) -> PreTrainedModel:
        """Return the model, see :func:`load`."""
        return load(self.path, self.head, dtype=self.dtype, config=self.config)

    @property
    def tokenizer(self) -> str:
        """The same path."""
        return self.path

    def digest(self) -> str | None:
        """Return a hash of the files of a folder and the options; ``None`` for a model of the hub."""
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
    """Where the student comes from: layers of the teacher or of ``source``, another model, or random weights.

    Args:
        layers: teacher layers to start from, numbered ``1..L`` (negative: from the end).
        path: instead: another pretrained model, by name or folder, with the teacher's tokenizer. It gets a head like
            the teacher's.
        config: values to change in the config; without ``layers``, ``width`` and ``path`` the student starts from
            random weights (``{num_hidden_layers: 3}``).
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
        """Return the student for a teacher.

        Args:
            teacher: the teacher, or a model of its config where no weights are copied.
            source: where the teacher came from; its tokenizer must be that of ``path`` or ``source``.

        Raises:
            ModelError: the options contradict each other, or the student can't be made, see :func:`init_student` and
                :func:`load`.
        """
        if self.path is None:
            return self._from_teacher(teacher, source)
        if self.layers is not None:
            raise ModelError("A student has either layers (of the teacher) or a path (of another model), not both.")
        if self.width is not None or self.source is not None:
            raise ModelError("A student with a path is that model as it is: leave out width and source, or the path.")
        if source.tokenizer is not None:
            _check_tokenizers(self.path, source.tokenizer)
        head = next((h for h in _AUTO if isinstance(teacher, _classes(h, teacher.config))), None)
        if head is None:
            raise ModelError(
                f"A student with a path gets the teacher's head, which is one of {', '.join(_AUTO)}; the teacher is a "
                f"{type(teacher).__name__}. Build the student in Python, and pass both to Distiller."
            )
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
    dtype: Dtype = "float32",
    config: Mapping[str, Any] | None = None,
    new_head: bool = False,
) -> PreTrainedModel:
    """Return a transformers model by name or folder, none of whose weights is random.

    Args:
        path: name on the hub, or a folder.
        head: what is on top.
        dtype: precision of the weights.
        config: values to change in the config.
        new_head: allow a head and a pooler whose weights are not in the checkpoint, as for fine-tuning.

    Raises:
        ModelError: the folder or the name doesn't exist, its files can't be read or need code of their own, there is
            no such head, the config has no such value, or weights are missing or of other shapes.
    """
    if own := {"dtype", "torch_dtype"} & {*(config or ())}:
        raise ModelError(f"{own.pop()} is no value of a config, but an option beside it: dtype={dtype!r}.")
    settings = changed_config(_config(path), config or {})
    heads = [h for h in _AUTO if _classes(h, settings)]
    if head not in heads or dtype not in get_args(Dtype):
        raise ModelError(
            f"The model {path!r} can't be loaded with head={head!r} and dtype={dtype!r}. A {settings.model_type} has "
            f"the heads {', '.join(heads)}; the precisions are {', '.join(get_args(Dtype))}."
        )
    try:
        with _quiet():  # what is missing is looked at below
            model, info = _AUTO[head].from_pretrained(
                path, config=settings, dtype=getattr(torch, dtype), weights_only=True, trust_remote_code=False,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # whatever the readers of files raise
        raise ModelError(
            f"The weights of the model {path!r} can't be loaded: {error} Save or download them again, and check what "
            "config=... changes."
        ) from error
    assert isinstance(model, PreTrainedModel)
    if other := sorted(info["mismatched_keys"]):
        name, saved, wanted = other[0]
        raise ModelError(
            f"{name} has the shape {tuple(saved)} in the checkpoint {path!r}, and {tuple(wanted)} by its config. Leave "
            "out of config=... what changes shapes; a head for other labels needs a checkpoint without one."
        )
    body = "" if head == "none" else f"{model.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    if layers := [name for name in missing if name.startswith(body) and "pooler" not in name]:
        raise ModelError(
            f"The checkpoint {path!r} has no weights for {', '.join(layers[:4])}: weights of its layers would be "
            "random. Name the folder of a whole model, as save_pretrained writes it."
        )
    if missing and not new_head:
        raise ModelError(
            f"The checkpoint {path!r} has no weights for {', '.join(missing[:4])}: its head would be random. Fine-tune "
            "it on the task first (ildistil finetune), or choose the head it was saved with."
        )
    if head == "causal-lm":
        _check_causal(path, model)
    if missing:
        rank_zero_info(f"{path} has no weights for {', '.join(missing[:4])}: they start at random.")
    return model


def _check_causal(path: str, model: PreTrainedModel) -> None:
    """Refuse an encoder whose tokens see those that they are to predict; most causal models have no such setting."""
    if getattr(model.config, "is_decoder", True):
        return
    inputs = {"input_ids": torch.arange(8)[None, 3:]}
    trial = Trial.of(inputs, torch.ones_like(inputs["input_ids"]))
    sees_later = None
    with suppress(ModelRunError), undisturbed(model), model_errors(path, inputs):  # it may want other inputs
        sees_later = depends_on_later_tokens(lambda changed: model(**changed).logits, trial, "input_ids")
    if sees_later:
        raise ModelError(
            f"The model {path!r} is an encoder: each of its tokens sees the next one, which a causal-lm head is to "
            "predict. Set is_decoder to true in its config (config: {is_decoder: true}), which hides later tokens, or "
            "use head: masked-lm with masked labels."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what it loads."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _config(path: str) -> PreTrainedConfig:
    folder = Path(path)
    if folder.is_file():
        raise ModelError(f"{path!r} is a file. Name the folder of a model, as save_pretrained writes it.")
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, near, n=1)
        hint = f" Did you mean {path.removesuffix(folder.name) + close[0]!r}?" if close else ""
        raise ModelError(f"There is no folder {path!r}. Folders beside it: {', '.join(near[:8]) or 'none'}.{hint}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(f"The folder {path!r} has no config.json, but {found}. Name one that save_pretrained wrote.")
    storage.verify_folder(folder, ModelError, storage.CHANGED)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a connection, a file, a value, or a kind of model that transformers doesn't have
        raise ModelError(
            f"The model {path!r} can't be loaded. Name a folder made by save_pretrained, or a model of the hub (which "
            "needs a connection) that runs without code of its own; build others yourself, and pass them to "
            f"Distiller: {error}"
        ) from error


def _classes(head: Head, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    return classes_of(_AUTO[head], config)


def _without_random_weights(path: str) -> PreTrainedModel:
    """Load a checkpoint's body: with its pooler if it has one, else as the masked language model it is."""
    with torch.random.fork_rng(devices=[]):
        try:
            return load(path, "none")
        except ModelError as error:
            try:
                return load(path, "masked-lm")
            except ModelError:
                raise error from None


def _check_tokenizers(student: str, teacher: str) -> None:
    mine, theirs = _vocabulary(student), _vocabulary(teacher)
    if mine != theirs:
        example = next((w for w in theirs if mine.get(w) != theirs[w]), next(iter(mine)))
        raise ModelError(
            f"The tokenizers of student ({student}) and teacher ({teacher}) differ: {example!r} is {mine.get(example)} "
            f"in one and {theirs.get(example)} in the other. Both models must read the same token ids; choose a "
            "student with the teacher's tokenizer."
        )


def _vocabulary(path: str) -> dict[str, int]:
    try:
        vocabulary: dict[str, int] = load_tokenizer(path).get_vocab()
    except IldistilError as error:
        raise ModelError(f"The model {path!r} has no tokenizer. Save it beside the model: {error}") from error
    return vocabulary
