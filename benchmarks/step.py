"""What the engine adds to a training step, against the same two forward passes and backward written by hand.

Both sides run the same models with ``LogitsKL`` alone, interleaved in one process; the figure is the ratio of medians.

``python benchmarks/step.py``
"""

import torch
import torch.nn.functional as F
from measure import finish, inputs, interleaved, models, options

from ildistil import Distillation, objectives


def measure(batch: int, tokens: int, device: str, repeats: int) -> list[list[object]]:
    student, teacher = (model.to(device) for model in models())
    seen = {name: value.to(device) for name, value in inputs(batch, tokens).items()}
    engine = Distillation(student, teacher, [objectives.LogitsKL(temperature=2.0)])

    def by_hand() -> None:
        student.zero_grad()
        with torch.no_grad():
            target = teacher(**seen).logits
        logits = student(**seen).logits
        own, wanted = (F.log_softmax(z / 2, -1) for z in (logits, target))
        (4 * F.kl_div(own, wanted, log_target=True, reduction="batchmean")).backward()

    def with_engine() -> None:
        student.zero_grad()
        engine(seen).total.backward()

    seconds = interleaved({"by hand": by_hand, "engine": with_engine}, repeats)
    return [[f"{batch} x {tokens}", name, 1e3 * s, s / seconds["by hand"]] for name, s in seconds.items()]


if __name__ == "__main__":
    chosen = options(__doc__, repeats=15, device="cpu").parse_args()
    rows = [row for shape in ((32, 32), (8, 128)) for row in measure(*shape, chosen.device, chosen.repeats)]
    finish("step", ["batch", "step", "ms", "of by hand"], rows, chosen.json)
