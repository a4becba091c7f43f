"""Where the layers of a model are."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["coders", "find_layers", "find_stacks", "only_stack", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Find the stack of Transformer layers: the outermost ``ModuleList`` as long as the config says the model is deep.

    Return an empty list when there is none or more than one.
    """
    if coders(model):
        return []
    stacks = _outermost(model)
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        text = config.get_text_config()
        # ALBERT shares layers in groups; LXMERT's number of layers is a mapping.
        lengths = (getattr(text, "num_hidden_layers", 0), getattr(text, "num_hidden_groups", None))
        stacks = [stack for stack in stacks if len(stack) in lengths]
    return stacks[0] if len(stacks) == 1 else []


def find_stacks(model: nn.Module) -> dict[str | None, list[nn.Module]]:
    """Find the layers of every stack: ``encoder`` and ``decoder``, or those of the only stack under ``None``."""
    found = coders(model)
    return {name: only_stack(coder) for name, coder in found.items()} if found else {None: find_layers(model)}


def coders(model: nn.Module) -> dict[str, nn.Module]:
    """Return the encoder and the decoder of an encoder-decoder; none of other models."""
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "is_encoder_decoder", False):
        return {}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    # The encoder of such a model, taken alone, has its config and finds itself.
    alone = encoder is model or decoder is model or encoder is decoder
    return {} if alone else {"encoder": encoder, "decoder": decoder}


def only_stack(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a module with a single stack; none if it has more."""
    stacks = _outermost(model)
    return stacks[0] if len(stacks) == 1 else []


def _outermost(model: nn.Module) -> list[list[nn.Module]]:
    stacks: list[list[nn.Module]] = []
    inside: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            if not any(path.startswith(outer) for outer in inside):
                stacks.append(list(module))
            inside.add(path + ".")
    return stacks
