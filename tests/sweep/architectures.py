"""Which classes of transformers are swept: of every model type the heads people use most, or else the base model."""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

HEADS = {
    "base": ("MODEL_MAPPING_NAMES",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "seq2seq": (
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    ),
    "texts": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
    "images": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"),
    "sounds": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",),
}


class Architecture(NamedTuple):
    """A class of models, and what its head does."""

    model_type: str
    head: str
    name: str


def architectures() -> list[Architecture]:
    """All that are swept; a class that several model types share comes once, for the type it is named after."""
    found: dict[str, Architecture] = {}
    for model_type in CONFIG_MAPPING:
        for head, name in _classes(model_type):
            other = found.get(name)
            shared = other is not None and other.model_type != model_type
            if other is None or (_named_after(name, model_type) if shared else head == "seq2seq"):
                found[name] = Architecture(model_type, head, name)
    return sorted(found.values())


def _named_after(name: str, model_type: str) -> bool:
    return name.lower().startswith(model_type.replace("_", "").replace("-", ""))


def _classes(model_type: str) -> Iterator[tuple[str, str]]:
    """The classes with heads; the base model only where there is none of them."""
    found = {
        head: name
        for head, mappings in HEADS.items()
        if (name := next((n for mapping in mappings if (n := _name(mapping, model_type))), None))
    }
    if len(found) > 1:
        found.pop("base", None)
    yield from found.items()


def _name(mapping: str, model_type: str) -> str | None:
    name = getattr(auto, mapping).get(model_type)
    return name[0] if isinstance(name, tuple | list) else name
