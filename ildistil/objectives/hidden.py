"""Objectives on hidden states."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ildistil import distributed, functional
from ildistil.capture import Activations, ModelInfo, Role, Tap
from ildistil.functional.checks import check_flag
from ildistil.mappings import All, Explicit, LayerMapping
from ildistil.objectives.base import Weight, same_tokens
from ildistil.objectives.mapped import JointObjective, MappedObjective, PairwiseObjective, Stack
from ildistil.objectives.pooling import Pool, checked, pooling
from ildistil.objectives.projection import ProjectionOption, option, project
from ildistil.objectives.states import StateObjective


class HiddenMSE(StateObjective):
    """Mean squared error of the hidden states of mapped layers, over all real tokens ("Hid-Seq").

    ``1/(n d) sum_i ||W h_S,i + b - h_T,i||^2`` for an example of ``n`` tokens and a teacher of width ``d``; mean over
    examples, then over pairs. Layer 0, the embedding output, can be mapped too. The other arguments are those of
    :class:`MappedObjective`.

    Args:
        projection: whether a linear map takes the student's states to the teacher's width: ``"auto"`` where the
            widths differ, ``"always"``, or ``"never"``; one map for each pair, trained along. A
            :class:`~ildistil.objectives.Projection` says more: one map for all pairs, a norm, an orthogonal start.

    Raises:
        ObjectiveError: the widths differ and there is no projection.

    Source: Jiao et al., "TinyBERT", 2020; Wang et al., "How to Distill your BERT", 2023.
    """


class EmbeddingMSE(StateObjective):
    """Mean squared error of the embedding outputs, over all real tokens.

    :class:`HiddenMSE` of layer 0, with its arguments: ``1/(n d) sum_i ||W h_S,i + b - h_T,i||^2``.

    Raises:
        ObjectiveError: the widths differ and there is no projection.

    Source: Jiao et al., "TinyBERT", 2020.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        projection: ProjectionOption = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, Explicit([[0, 0]]), projection, stack, name)


class HiddenCosine(StateObjective):
    """Cosine distance of the hidden states of mapped layers, over all real tokens.

    ``1/n sum_i (1 - cos(W h_S,i + b, h_T,i))`` for an example of ``n`` tokens; mean over examples, then over pairs.
    DistilBERT maps ``Last()``. The arguments are those of :class:`HiddenMSE`.

    Raises:
        ObjectiveError: the widths differ and there is no projection.

    Source: Sanh et al., "DistilBERT", 2019.
    """

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the distance of each example."""
        return functional.hidden_cosine(student, teacher, mask)


class CLSMSE(StateObjective):
    """Mean squared error of the first token's hidden state in mapped layers ("Hid-CLS"); normalised, it is PKD's.

    ``1/d ||W h_S + b - h_T||^2``, or with ``normalize`` ``||h_S/||h_S|| - h_T/||h_T|| ||^2``; mean over examples, then
    over pairs. ``h`` is the state of the first real token, also where padding stands left; of a model whose head pools
    otherwise, what that pools: of a causal one the last real token's, as its first token sees no other. PKD maps
    ``Skip()``. The other arguments are those of :class:`HiddenMSE`.

    Args:
        normalize: compare directions: both states are divided by their length, and the squares summed.
        pool: which vector stands for a text: ``"auto"``, which is for each model what its head pools, or ``"first"``,
            ``"last"`` or ``"mean"`` of the real tokens for both.

    Raises:
        ConfigError: there is no such pooling.
        ObjectiveError: the widths differ and there is no projection; or ``pool="first"`` of a causal model.

    Source: Sun et al., "Patient Knowledge Distillation", 2019; Wang et al., "How to Distill your BERT", 2023.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        projection: ProjectionOption = "auto",
        normalize: bool = False,
        pool: Pool = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, projection, stack, name)
        check_flag("CLSMSE: normalize", normalize)
        self.normalize, self.pool = normalize, checked(pool)

    def states(self, activations: Activations, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return one state for each text."""
        states, mask = activations.hidden.take(layer), activations.mask
        same_tokens(states, mask, axis=1)
        pooled = functional.pool(states, mask, pooling(self.pool, activations))
        return [(pooled.unsqueeze(1), mask.any(1, keepdim=True))]

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the squared error of each example."""
        return functional.cls_mse(student, teacher, mask, self.normalize)


class CLSAttentiveMSE(MappedObjective):
    """Mean squared error of the first token's state with an attention-weighted mean of several teacher layers.

    ``1/d ||W h_S - sum_j a_j h_T,j||^2`` with ``a = softmax_j((W h_S) h_T,j / sqrt(d))`` over the teacher layers ``j``
    that the mapping pairs with a student layer; mean over examples, then over student layers. ``h`` is as in
    :class:`CLSMSE`. No teacher layer has to be chosen, and none is left out. The other arguments are those of
    :class:`MappedObjective`.

    Args:
        mapping: which teacher layers each student layer may attend to; default ``All()``.
        projection: see :class:`HiddenMSE`; the map is of the student layer.
        pool: see :class:`CLSMSE`.

    Raises:
        ConfigError: there is no such pooling.
        ObjectiveError: the widths differ and there is no projection; or ``pool="first"`` of a causal model.

    Source: Passban et al., "ALP-KD: Attention-Based Layer Projection for Knowledge Distillation", 2021 (there without
    the division by ``sqrt(d)``).
    """

    taps = ("hidden",)
    default_mapping = All()

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        projection: ProjectionOption = "auto",
        pool: Pool = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        self.projection, self.pool = option(projection), checked(pool)

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and make a projection of each student layer."""
        super().build(student, teacher)
        widths = (info.width for info in self.models)
        self.projection.make(self, {self._key(layer) for layer, _ in self.pairs}, *widths)

    def reads(self, role: Role, info: ModelInfo) -> list[Tap]:
        """Return each student layer once, and the teacher layers of each."""
        layers = self.layers()[0] if role == "student" else [t for _, t in self.pairs]
        return [self.tap(layer) for layer in layers]

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean over the student layers."""
        student, teacher = student.stack(self.stack), teacher.stack(self.stack)
        layers: dict[int, list[int]] = {}
        for s, t in self.pairs:
            layers.setdefault(s, []).append(t)
        return torch.stack([self._layer_loss(s, chosen, student, teacher) for s, chosen in layers.items()]).mean()

    def _key(self, layer: int) -> str:
        return self.projection.key((layer, 0), draws=True)  # the map is of the student layer alone

    def _layer_loss(self, layer: int, chosen: list[int], student: Activations, teacher: Activations) -> Tensor:
        mask, hidden = student.mask, student.hidden.take(layer)
        others = [teacher.hidden.take(t) for t in chosen]
        same_tokens(hidden, others[0], axis=1)
        pool, pool_teacher = (pooling(self.pool, run) for run in (student, teacher))
        own = project(self.projections, self._key(layer), functional.pool(hidden, mask, pool), mask.any(1))
        # Autocast can't join states of the half precision that it isn't of itself.
        with functional.full_precision(*(functional.pool(other, mask, pool_teacher) for other in others)) as states:
            theirs = torch.stack(states, dim=1)
        with functional.full_precision(own, theirs) as (s, t):
            attention = (torch.einsum("bd,bld->bl", s, t) * t.shape[-1] ** -0.5).softmax(-1)
            target = torch.einsum("bl,bld->bd", attention, t)
            return functional.example_mean((s - target).square().mean(-1), mask.sum(1))


class HiddenConcatMSE(JointObjective):
    """Mean squared error between all mapped student layers together and all mapped teacher layers together.

    ``1/(n D) sum_i ||W s_i + b - t_i||^2``, where ``s_i`` and ``t_i`` are the states of token ``i`` in all student and
    all teacher layers, concatenated; ``D`` is the length of ``t_i``. The learned map is on the student's side only: on
    the teacher's it could shrink the targets to nothing. The other arguments are those of :class:`MappedObjective`.

    Args:
        mapping: which layers take part, on either side; default ``All()``. How it pairs them doesn't matter.
        projection: see :class:`HiddenMSE`; the map is from all layers to all layers.

    Raises:
        ObjectiveError: the concatenated widths differ and there is no projection.

    Source: the mapping "combine" in the code of Wang et al., "How to Distill your BERT", 2023 (there the teacher's side
    is mapped).
    """

    taps = ("hidden",)
    default_mapping = All()

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        projection: ProjectionOption = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        self.projection = option(projection)

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and make one projection for all layers."""
        super().build(student, teacher)
        sides = zip(self.models, self.layers(), strict=True)
        self.projection.make(self, ["all"], *(info.width and info.width * len(layers) for info, layers in sides))

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the error of the concatenated states."""
        student, teacher = student.stack(self.stack), teacher.stack(self.stack)
        own, theirs = self.layers()
        s = torch.cat([student.hidden.take(layer) for layer in own], dim=-1)
        # Autocast can't join states of the half precision that it isn't of itself.
        with functional.full_precision(*(teacher.hidden.take(layer) for layer in theirs)) as states:
            t = torch.cat(states, dim=-1)
        same_tokens(s, t, axis=1)
        values = functional.hidden_mse(project(self.projections, "all", s, student.mask), t, student.mask)
        return functional.example_mean(values, student.mask.sum(1))


class HiddenCKA(PairwiseObjective):
    """One minus the linear centred kernel alignment of the hidden states of mapped layers, over all tokens of a batch.

    ``1 - ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` with the real tokens of the batch as rows of ``X`` (student) and
    ``Y`` (teacher), centred; mean over pairs. Widths may differ without a projection. The term couples the examples of
    a batch: it takes in the batches of all processes, and refuses accumulated batches. A batch should have several
    times more tokens than the states have dimensions: fewer make any two layers look alike. The arguments are those of
    :class:`MappedObjective`.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019.
    """

    taps = ("hidden",)
    batch_coupled = True

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Return the distance of two layers."""
        s, t = student.hidden.take(pair[0]), teacher.hidden.take(pair[1])
        same_tokens(s, t, axis=1)
        return functional.hidden_cka(s, t, student.mask, distributed.all_reduce_sum)
