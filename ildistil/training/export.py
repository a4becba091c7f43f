"""Take the student out of a checkpoint: a plain transformers folder that needs nothing of this library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ildistil import storage
from ildistil.errors import CheckpointError, IldistilError, NotFiniteError
from ildistil.students.heads import head_parameters
from ildistil.students.layers import changed_config
from ildistil.students.tokenizers import check_words, load_tokenizer
from ildistil.training.checkpoint import STUDENT, Saved
from ildistil.training.checkpoint_files import load

__all__ = ["export", "load_student", "save_student"]

_FRONT_MATTER = "---\nlibrary_name: transformers\ntags: [distillation, ildistil]\n---"


def load_student(checkpoint: str | Path) -> PreTrainedModel:
    """Rebuild the student of a checkpoint, without its teacher, in eval mode.

    Args:
        checkpoint: a ``.ckpt`` file that a Trainer with a :class:`~ildistil.Distiller` wrote.

    Raises:
        CheckpointError: the file is not such a checkpoint.
    """
    return _rebuild(*_read(checkpoint), checkpoint)


def export(
    checkpoint: str,
    output: str,
    tokenizer: str | None = None,
    overwrite: bool = False,
    keep_head: bool = False,
) -> None:
    """Write the student of a checkpoint as a plain transformers folder, with tokenizer, label names and model card.

    A head that no term of the run trained is left out: whoever loads the folder for a task is then told that its head
    is new.

    Args:
        checkpoint: the .ckpt file.
        output: the folder to write.
        tokenizer: name or folder of the tokenizer; by default the one the run used.
        overwrite: replace the files of a folder that has some already.
        keep_head: keep a head that no term trained, such as the teacher's over states that were trained to be its own.
    """
    target = Path(output)
    if target.is_file():
        raise CheckpointError(f"{output!r} is a file. Name a folder.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"The folder {output!r} is not empty. Name another one, or add --overwrite=true.")
    content, saved = _read(checkpoint)
    student: PreTrainedModel = _rebuild(content, saved, checkpoint)
    if saved.head_untrained and not keep_head:
        student = student.base_model
        rank_zero_info(
            f"The student's head is left out, since no term trained it: {output} holds the encoder, "
            f"a {type(student).__name__}. Fine-tune it next: ildistil finetune --model.path {output}"
        )
    source = tokenizer or saved.tokenizer
    if source is None:
        raise CheckpointError(
            "The checkpoint doesn't say which tokenizer belongs to the student. Name it: --tokenizer=NAME."
        )
    try:
        loaded = load_tokenizer(source)
    except IldistilError as error:
        raise CheckpointError(f"{error} Name the student's: --tokenizer=NAME.") from error
    save_student(student, target, loaded, _card(student, saved, content["global_step"]))


def save_student(
    student: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase, card: str | None = None
) -> None:
    """Save a student with its tokenizer, a model card if given, and the checksums of all files: whole or not at all.

    ``student.save_pretrained`` alone leaves out the tokenizer, and of a folder without one transformers makes one that
    knows no word. A folder with files gets these in their place.

    Args:
        student: the model.
        folder: the folder to write.
        tokenizer: its tokenizer.
        card: the text of ``README.md``.

    Raises:
        NotFiniteError: a weight isn't a number.
        DataError: the tokenizer knows no words.
        WriteError: the folder can't be written.
    """
    for name, value in student.named_parameters():
        if not bool(value.isfinite().all()):
            raise NotFiniteError(f"{name} of the student has values that are NaN or infinite. Take an earlier one.")
    check_words(tokenizer)
    with storage.replacing_folder(Path(folder)) as draft:
        student.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        if card is not None:
            (draft / "README.md").write_text(card, encoding="utf-8")


def _read(checkpoint: str | Path) -> tuple[dict[str, Any], Saved]:
    content, name = load(checkpoint), repr(str(checkpoint))
    saved = Saved.read(content, name)
    if saved.student is None:
        raise CheckpointError(f"{name} holds no transformers student that an ildistil Distiller saved.")
    return content, saved


def _rebuild(content: Mapping[str, Any], saved: Saved, checkpoint: str | Path) -> PreTrainedModel:
    recipe = saved.student
    assert recipe is not None
    architecture: Any = getattr(transformers, str(recipe["architecture"]), None)
    known = isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)
    if not known:
        raise CheckpointError(
            f"The student in {str(checkpoint)!r} is a {recipe['architecture']}, which this version of transformers "
            f"({transformers.__version__}) doesn't have."
        )
    student: PreTrainedModel = architecture(changed_config(architecture.config_class.from_dict(recipe["config"]), {}))
    weights: dict[str, Tensor] = {
        key.removeprefix(STUDENT).removeprefix("_orig_mod."): value
        for key, value in content["state_dict"].items()
        if key.startswith(STUDENT)
    }
    student.load_state_dict(weights)
    return student.eval()


def _card(student: PreTrainedModel, saved: Saved, steps: int) -> str:
    config = student.config
    text = config.get_text_config()
    size = (
        f"{text.num_hidden_layers} layers, width {text.hidden_size}, {student.num_parameters() / 1e6:.1f} M parameters"
    )
    distilled = any(not spec.startswith("TaskLoss(") for spec in saved.objectives.values())
    title = "Distilled student" if distilled else "Fine-tuned model"
    parts = [_FRONT_MATTER, f"# {title}\n\n{type(student).__name__}, {size}."]
    if saved.head_untrained:
        kept = head_parameters(student)
        what = "Its head was trained by no objective" if kept else "It has no head, since no objective trained one"
        parts.append(f"{what}: fine-tune it on a task before use, for instance by `ildistil finetune`.")
    if saved.teacher:
        parts.append(f"Teacher: `{saved.teacher}`.")
    if getattr(config, "init_layers", None):
        parts.append(f"Initialised from the teacher's layers {', '.join(map(str, config.init_layers))}.")
    parts.append("## Objectives\n\n" + "\n".join(f"- `{n}`: `{spec}`" for n, spec in saved.objectives.items()))
    if saved.metrics:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in saved.metrics.items())
        parts.append(f"## Evaluation\n\n| metric | value |\n|---|---|\n{rows}")
    parts.append(f"Trained for {steps} steps with ildistil.")
    return "\n\n".join(parts) + "\n"
