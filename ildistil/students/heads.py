"""What a transformers model has on top of its body."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from ildistil.errors import ModelError

__all__ = ["freeze_body", "head_parameters", "is_untrained"]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a model has beside those of its body, by name; none of a body alone.

    >>> import transformers
    >>> config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    >>> list(head_parameters(transformers.BertForSequenceClassification(config)))
    ['classifier.weight', 'classifier.bias']
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return {}
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in body}


def is_untrained(model: nn.Module, unreached: Iterable[nn.Parameter]) -> bool:
    """Return whether a model has a head, and all of it is among the parameters that no term reaches."""
    head, idle = head_parameters(model).values(), {id(parameter) for parameter in unreached}
    return bool(head) and all(id(parameter) in idle for parameter in head)


def freeze_body(model: nn.Module) -> None:
    """Leave only a model's head to train.

    Weights that the head shares with the body, such as embeddings that also predict tokens, stay as they are.

    Raises:
        ModelError: it has no head of its own.
    """
    head = head_parameters(model)
    if not head:
        raise ModelError(
            f"A {type(model).__name__} has no head with weights of its own, so that nothing would be trained without "
            "the rest. Leave out freeze."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in head.values():
        parameter.requires_grad_(True)
