"""Where the layers of a model are."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def layered_config(model: nn.Module) -> PreTrainedConfig | None:
    """Return the config of a model's layers: that of its text model, or of images where it has no text model.

    ``None`` for a plain module.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    text: PreTrainedConfig = config.get_text_config()
    parts = {type(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    images = getattr(config, "vision_config", None)
    return images if type(text) not in parts and type(images) in parts else text


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Find the stack of Transformer layers: the outermost ``ModuleList`` as long as the config says the model is deep.

    Return an empty list when there is none or more than one.
    """
    if coders(model):
        return []
    stacks = _outermost(model)
    if (config := layered_config(model)) is not None:  # ALBERT shares layers in groups
        stacks = _as_deep(stacks, config, "num_hidden_layers", "num_hidden_groups")
    return stacks[0] if len(stacks) == 1 else []


def find_stacks(model: nn.Module) -> dict[str | None, list[nn.Module]]:
    """Find the layers of every stack: ``encoder`` and ``decoder``, or those of the only stack under ``None``."""
    found = coders(model)
    return {name: coder_layers(name, coder) for name, coder in found.items()} if found else {None: find_layers(model)}


def coders(model: nn.Module) -> dict[str, nn.Module]:
    """Return the encoder and the decoder of an encoder-decoder; none of other models."""
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "is_encoder_decoder", False):
        return {}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    # The encoder of such a model, taken alone, has its config and finds itself.
    alone = encoder is model or decoder is model or encoder is decoder
    return {} if alone else {"encoder": encoder, "decoder": decoder}


def coder_layers(name: str, coder: nn.Module) -> list[nn.Module]:
    """Return the layers of the encoder or the decoder: its only outermost ``ModuleList``, or the one as long as it."""
    stacks, config = _outermost(coder), getattr(coder, "config", None)
    if len(stacks) > 1:
        stacks = _as_deep(stacks, config, f"{name}_layers", f"num_{name}_layers", "num_hidden_layers")
    return stacks[0] if len(stacks) == 1 else []


def _as_deep(stacks: list[list[nn.Module]], config: object, *names: str) -> list[list[nn.Module]]:
    depths = [getattr(config, name, None) for name in names]
    return [stack for stack in stacks if len(stack) in depths]


def _outermost(model: nn.Module) -> list[list[nn.Module]]:
    stacks: list[list[nn.Module]] = []
    inside: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            if not any(path.startswith(outer) for outer in inside):
                stacks.append(list(module))
            inside.add(path + ".")
    return stacks
