"""Pure losses: tensors in, one value per example out, masks as arguments; in ``scores``, what attention scores are.

Conventions, everywhere the same:

- ``student`` comes first, ``teacher`` second; the teacher gets no gradient from these functions' callers, but nothing
  here detaches it.
- Every loss returns a tensor of shape ``(batch,)``: the mean *within* each example over what its mask lets count.
  :func:`example_mean` then averages over the examples that have anything to count. This is the reduction of the
  literature (attention losses are divided by the length of *their* sequence), and it makes padding exact. Correlations
  aren't always defined: :func:`attention_dist` and :func:`logits_dist` also return for which examples they are.
- The losses that compare examples with each other (``*_over_batch``, :func:`hidden_cka`) return a scalar. Sums over the
  batch go through their argument ``total``, which may extend them over several processes.
- Half-precision inputs are computed in float32, float64 stays float64, whatever ``autocast`` says.
- Values are in nats (KL) or squared units of the input (MSE).
- Masks are boolean, the rest are floating-point numbers, and nothing is broadcast that isn't said to be: else an
  :class:`~ildistil.errors.ObjectiveError`, or a :class:`~ildistil.errors.ConfigError` for a setting, says what was got.
"""

from ildistil.functional.attention import (
    attention_dist,
    attention_dist_over_batch,
    attention_kl,
    attention_mse,
    attention_output,
)
from ildistil.functional.contrast import info_nce, log_normalizer, nce
from ildistil.functional.hidden import cls_mse, hidden_cka, hidden_cosine, hidden_mse
from ildistil.functional.logits import logits_dist, logits_dist_over_batch, logits_kl, logits_mse
from ildistil.functional.pooling import first_token, last_token, pool, token_mean
from ildistil.functional.reduction import example_mean, full_precision, masked_mean

__all__ = [
    "attention_dist",
    "attention_dist_over_batch",
    "attention_kl",
    "attention_mse",
    "attention_output",
    "cls_mse",
    "example_mean",
    "first_token",
    "full_precision",
    "hidden_cka",
    "hidden_cosine",
    "hidden_mse",
    "info_nce",
    "last_token",
    "log_normalizer",
    "logits_dist",
    "logits_dist_over_batch",
    "logits_kl",
    "logits_mse",
    "masked_mean",
    "nce",
    "pool",
    "token_mean",
]
