"""What is refused before anything runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ildistil.capture import ModelInfo
from ildistil.errors import DataError, ModelError, ObjectiveError
from ildistil.objectives import Objective
from ildistil.schedules import Schedule

NO_OBJECTIVE = (
    "There is no objective. Give at least one, such as objectives.LogitsKL(): as a callback of the Trainer, in a YAML "
    "file under 'objectives:', or to Distillation(...)."
)


def named_objectives(objectives: Iterable[Objective] | Mapping[str, Objective]) -> dict[str, Objective]:
    """Return the objectives by their names, in their order, checked; a mapping names them."""
    if isinstance(objectives, Mapping):
        for name, objective in objectives.items():
            objective.name = name
        objectives = objectives.values()
    if isinstance(objectives, Objective):
        raise ObjectiveError(f"Objectives come in a list: [{type(objectives).__name__}(...)].")
    named: dict[str, Objective] = {}
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise ObjectiveError(
                f"{objective!r} is not an objective. Give instances, such as objectives.LogitsKL(), or of your own "
                "subclass of Objective."
            )
        name = objective.name
        if not name or "." in name or "/" in name or name == "loss" or hasattr(nn.ModuleDict, name):
            raise ObjectiveError(
                f"An objective can't be named {name!r}: a name has no '.' or '/', isn't 'loss', and is no method of a "
                "ModuleDict, such as 'values'."
            )
        if name in named:
            raise ObjectiveError(
                f"Two objectives are named {name!r}. Name one of them: {type(objective).__name__}(..., name='...')."
            )
        named[name] = objective
    if not named:
        raise ObjectiveError(NO_OBJECTIVE)
    _check_weights(named)
    return named


def _check_weights(named: Mapping[str, Objective]) -> None:
    if all(objective.weight == 0 for objective in named.values()):
        raise ObjectiveError("All objectives have weight 0: nothing would be learned.")
    for name, objective in named.items():
        if isinstance(objective.weight, Schedule):
            weights = [objective.weight(i / 100) for i in range(101)]
            if not all(0 <= weight < float("inf") for weight in weights):
                raise ObjectiveError(
                    f"The weight of {name}, {objective.weight}, is not always a finite number >= 0: it goes from "
                    f"{min(weights)} to {max(weights)}."
                )


def check_batch(batch: Any, positions: int | None) -> None:
    """Refuse what is no batch, or longer than the models' positions, if these have a limit."""
    if not isinstance(batch, Mapping):
        raise ObjectiveError(
            f"A batch must be a mapping of names to tensors, such as {{'input_ids': ..., 'labels': ...}}; got a "
            f"{type(batch).__name__}. Let the collate function give a dict."
        )
    tokens = batch.get("input_ids")
    if positions is not None and isinstance(tokens, Tensor) and tokens.shape[1] > positions:
        raise DataError(
            f"A sequence of {tokens.shape[1]} tokens is longer than the models' {positions} positions. Cut the texts "
            f"at {positions} tokens (max_length={positions} in the data module, truncation in your tokenizer)."
        )


def check_numbers_of_real_rows(batch: Mapping[str, Any]) -> None:
    """Refuse labels that are numbers in rows without any token: no loss of a model can leave them out."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if not isinstance(labels, Tensor) or not isinstance(mask, Tensor) or not labels.is_floating_point():
        return
    empty = (mask == 0).flatten(1).all(1).nonzero().flatten().tolist()
    if empty and len(labels) == len(mask):
        raise DataError(
            f"Row {empty[0]} of a batch has no token and the label {labels[empty[0]].tolist()}, which the student's "
            "own loss would count. Leave rows of padding out of the data."
        )


def check_models(student: ModelInfo, teacher: ModelInfo) -> None:
    """Refuse two models that read other tokens, or number their labels otherwise."""
    if None not in (student.vocabulary, teacher.vocabulary) and student.vocabulary != teacher.vocabulary:
        raise ModelError(
            f"The student's vocabulary has {student.vocabulary} entries, the teacher's {teacher.vocabulary}: the same "
            "token ids would mean different words. Student and teacher must share one tokenizer."
        )
    check_label_order(student, teacher.label_names, "the teacher")


def check_label_order(student: ModelInfo, names: Sequence[str], whose: str) -> None:
    """Refuse the student's labels in another order; ``names`` are the other's, in lower case."""
    mine, theirs = list(student.label_names), list(names)
    if mine != theirs and sorted(mine) == sorted(theirs):
        raise ModelError(
            f"The student numbers its labels {mine}, {whose} {theirs}. Bring them into one order: the same number "
            "would mean different labels."
        )


def check_learned_parts(objective: Objective) -> None:
    """Refuse learnable parts beside ``projections``, where nothing would train them."""
    parts = [k for k, v in vars(objective).items() if isinstance(v, nn.Module | nn.Parameter) and k != "projections"]
    if parts:
        raise ObjectiveError(
            f"{type(objective).__name__} keeps learnable parts in {parts}, where nothing would train them. Put modules "
            "into self.projections['name'] in build()."
        )


def no_weight(progress: float | None) -> str:
    """Return the message for a step in which all terms have weight 0."""
    when = "" if progress is None else f" at {progress:.1%} of the training"
    return f"All terms have weight 0{when}: nothing would be learned. Let the schedules overlap, or train less long."
