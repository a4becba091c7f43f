"""What a teacher costs that stops after the deepest layer wanted, as a share of a whole run.

``python benchmarks/teacher.py``
"""

import torch
from measure import finish, inputs, interleaved, models, options

from ildistil.capture import Capture, Tap


def measure(batch: int, tokens: int, repeats: int) -> list[list[object]]:
    _, teacher = models()
    wanted = {"logits": frozenset({Tap("logits")})}
    for layer in (1, 3, 5, 6):
        wanted |= {f"hidden[{layer}]": frozenset({Tap("hidden", layer)})}
        wanted |= {f"attention[{layer}]": frozenset({Tap("attention", layer)})}
    capture = Capture(teacher, frozenset().union(*wanted.values()), "teacher")
    seen = inputs(batch, tokens)
    with torch.no_grad():
        seconds = interleaved({k: lambda w=w: capture(seen, wanted=w) for k, w in wanted.items()}, repeats)
    whole = seconds["logits"]
    return [[f"{batch} x {tokens}", name, 1e3 * s, s / whole] for name, s in seconds.items()]


if __name__ == "__main__":
    chosen = options(__doc__, repeats=7).parse_args()
    rows = [row for shape in ((8, 512), (32, 128)) for row in measure(*shape, chosen.repeats)]
    finish("teacher", ["batch", "deepest wanted", "ms", "of a whole run"], rows, chosen.json)
