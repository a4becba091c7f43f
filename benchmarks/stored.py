"""What an epoch costs with stored targets of the teacher, with the teacher itself, and as plain fine-tuning.

A 3-layer student of every second layer of the teacher, attention dropout 0, ``LogitsKL`` and ``AttentionKL`` on all its
layers, against ``TaskLoss`` alone; length-grouped batches of the same rows, in slices that take turns in one process.
Reading the targets counts. ``--data`` holds a folder of files for each GLUE task, ``--teacher`` is one with a model and
its tokenizer.

``python benchmarks/stored.py --data glue --teacher teacher``
"""

import argparse
import tempfile
import time

from measure import finish, options, sliced, training

from ildistil import Distillation, init_student, objectives
from ildistil.data import Glue
from ildistil.students import load
from ildistil.teachers import StoredTeacher, estimate, precompute


def terms() -> list[objectives.Objective]:
    return [objectives.LogitsKL(), objectives.AttentionKL()]


def measure(arguments: argparse.Namespace, folder: str) -> tuple[list[list[object]], dict[str, object]]:
    data = Glue(
        arguments.task, arguments.teacher, path=arguments.data, batch_size=arguments.batch, limit_train=arguments.rows,
        seed=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    teacher = load(arguments.teacher, config={"attention_probs_dropout_prob": 0.0})
    layers = list(range(2, teacher.config.num_hidden_layers + 1, 2))
    students = [init_student(teacher, layers=layers) for _ in range(3)]
    stored = StoredTeacher(folder, teacher)
    need = estimate(stored, terms(), students[0], batches)
    start = time.perf_counter()
    precompute(stored, terms(), students[0], batches, report=lambda line: None)
    making = time.perf_counter() - start
    epochs = {
        "fine-tuning": training(Distillation(students[0], None, [objectives.TaskLoss()])),
        "stored targets": training(Distillation(students[1], StoredTeacher(folder), terms())),
        "teacher runs": training(Distillation(students[2], teacher, terms())),
    }
    seconds = sliced({name: (train, batches) for name, train in epochs.items()})
    rows: list[list[object]] = [[name, s, s / seconds["fine-tuning"]] for name, s in seconds.items()]
    return rows, {"rows_of_data": need.rows, "bytes": need.bytes, "seconds_to_precompute": making}


if __name__ == "__main__":
    arguments = options(__doc__, data="glue", teacher="teacher", task="sst2", rows=4096, batch=32).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, more = measure(arguments, folder)
    finish("stored", ["epoch", "s", "of fine-tuning"], rows, arguments.json, task=arguments.task, **more)
