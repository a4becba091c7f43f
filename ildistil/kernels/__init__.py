"""Losses that never hold a map of all queries by all keys; in ``chunked``, ones that never hold a vocabulary's logits.

They give the same values and gradients as :mod:`ildistil.functional`, from what scores are made of:

- :func:`attention_kl` goes over blocks of heads and query rows, in plain torch or as Triton kernels. The gradient of a
  row's divergence with respect to the student's scores is ``p_S - p_T``: there is no need to keep any map.
- :func:`attention_mse` needs no scores at all where these are products and only padding is masked: matrices of the size
  of a head say it all, in time linear in the number of tokens. Else it goes over blocks too.

All are exact under padding, wherever it stands, whatever stands there. :class:`use` says which form is taken. The
Triton kernels are tested in Triton's interpreter; how fast they are on a GPU hasn't been measured.
"""

import torch
from torch import Tensor

from ildistil import functional
from ildistil.attention import Masks, Scores, allowed_map, real_tokens, score_map
from ildistil.functional.reduction import widened
from ildistil.kernels import blockwise, gram
from ildistil.kernels.choice import Form, chosen, short, triton_suits, use
from ildistil.kernels.spans import pairs

__all__ = ["Form", "Masks", "Scores", "attention_kl", "attention_mse", "use"]


def attention_kl(student: Scores, teacher: Scores, masks: Masks = Masks()) -> Tensor:  # noqa: B008
    """Kullback-Leibler divergence of the attention distributions, teacher first, without score maps.

    ``1/(H n) sum_h sum_i KL(softmax(a_T,hi) || softmax(a_S,hi))`` over the ``n`` real queries of each example.

    Args:
        student: what the student's scores are made of; queries, keys and bias may want gradients.
        teacher: the same of the teacher, of as many heads, whose sizes may differ; gets no gradient.
        masks: which scores count.

    Returns:
        ``(batch,)``, in nats.

    Raises:
        KernelError: a form was asked for that can't run here, see :class:`use`.

    >>> import torch
    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([[[[0.0], [0.0]]]])
    >>> attention_kl(Scores(q, k), Scores(q, torch.tensor([[[[0.0], [-1e9]]]])))
    tensor([0.6931])
    """
    real = real_tokens(masks.query_mask, student.query)
    form = chosen(student, has_triton_kernel=triton_suits(student, teacher))
    if form == "plain":
        return functional.attention_kl(*_maps(student, teacher, masks), real)
    if form == "triton":
        from ildistil.kernels.triton_kl import divergences  # Triton need not be installed
    else:
        from ildistil.kernels.blockwise import divergences
    sums: Tensor = divergences(student, teacher, masks)
    return sums / (student.heads * real.sum(1)).clamp(min=1)


def attention_mse(student: Scores, teacher: Scores, masks: Masks = Masks()) -> Tensor:  # noqa: B008
    """Mean squared error of attention scores, in time linear in the number of tokens wherever that is possible.

    ``1/(H N) sum_h sum_(i,j) (a_S,hij - a_T,hij)^2`` over the ``N`` pairs of a real query and a key it may attend to.

    Args:
        student: what the student's scores are made of; queries, keys and bias may want gradients.
        teacher: the same of the teacher, of as many heads, whose sizes may differ; gets no gradient.
        masks: which scores count.

    Returns:
        ``(batch,)``.

    Raises:
        KernelError: a form was asked for that can't run here, see :class:`use`.

    >>> import torch
    >>> q, k = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    >>> attention_mse(Scores(q, k), Scores(q, 3 * k))
    tensor([4.])
    """
    linear = gram.suits(student, teacher, masks)
    if chosen(student, linear=linear) == "plain":
        if linear and short(student):  # where scores are nearly the same, as exact as the linear form
            return _plain_mse(student.to(torch.float64), teacher.to(torch.float64), masks).to(
                widened(student.query).dtype
            )
        return _plain_mse(student, teacher, masks)
    sums: Tensor = (gram if linear else blockwise).squared_errors(student, teacher, masks)
    return sums / (student.heads * pairs(student, masks)).clamp(min=1)


def _plain_mse(student: Scores, teacher: Scores, masks: Masks) -> Tensor:
    return functional.attention_mse(*_maps(student, teacher, masks), real_tokens(masks.query_mask, student.query))


def _maps(student: Scores, teacher: Scores, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
    return score_map(student, masks), score_map(teacher.detach(), masks), allowed_map(student.query, student.key, masks)
