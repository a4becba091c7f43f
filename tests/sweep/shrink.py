"""Tiny configs: every size of a config becomes small by its name, nested configs too."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from sweep.settings import SETTINGS

WIDTH, HEADS, INNER, WORDS, POSITIONS = 32, 4, 48, 96, 128
WINDOW = 6  # longer than the short batch's rows, shorter than the long batch's
OTHER_DEPTH = 3  # of towers beside the one that is compared
MIDDLE = 8


def tiny_config(model_type: str, deep: bool, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Make the config of a student of few layers, or of a teacher of twice as many.

    Args:
        model_type: the name in transformers' ``CONFIG_MAPPING``.
        deep: whether it is the teacher's.
        overrides: settings of this type; a callable is called with the number of layers.
    """
    config: PreTrainedConfig = _tiny(CONFIG_MAPPING[model_type], deep, overrides, main=True, given={})
    return config


def _tiny(
    cls: type[PreTrainedConfig], deep: bool, overrides: Mapping[str, Any], main: bool, given: Mapping[str, Any]
) -> PreTrainedConfig:
    specs = cls.sub_configs_defaults
    overrides = {**SETTINGS.get(cls.model_type, {}), **overrides}
    defaults = {**_defaults(cls), **given}
    kinds = _kinds(cls, given)
    depth = (len(kinds) if len(kinds) > 1 else 2) * (2 if deep else 1) if main else OTHER_DEPTH
    settings = {name: value for name, value in given.items() if name not in specs and name != "model_type"}
    for name, value in defaults.items():
        if name in specs or name.startswith("_"):
            continue
        small = _small(name, value, depth)
        if small is not value:
            settings[name] = small
    _agree(settings, defaults)
    for name, kinds_of_layers in kinds.items():
        settings[name] = _layer_kinds(kinds_of_layers, depth)
    for name, spec in specs.items():
        settings.update(_sub_config(name, spec, deep, overrides.get(name, {}), main))
    chosen = {name: value for name, value in overrides.items() if name not in specs or not isinstance(value, dict)}
    settings.update({name: value(depth) if callable(value) else value for name, value in chosen.items()})
    return cls(**{name: value for name, value in settings.items() if value is not LEFT_OUT})


def _agree(settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """What depends on several settings."""
    for name, value in UNSAID.items():
        if name in defaults and defaults[name] is None and name not in settings:
            settings[name] = value
    if "qk_rope_head_dim" in defaults:  # the size of a head is made of its parts, and every head has its own key
        settings.pop("head_dim", None)
        if "num_key_value_heads" in defaults:
            settings["num_key_value_heads"] = HEADS
    for name, value in defaults.items():
        if isinstance(value, dict) and "mrope_section" in value:
            settings[name] = {**value, "mrope_section": [1, 1, 2]}


# Where the default is None, and the model needs a number.
UNSAID = {
    "vocab_size": WORDS, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS, "pad_token_id": 0,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS,
}  # fmt: skip
LEFT_OUT = object()  # as an override: leave the default


def _sub_config(name: str, spec: Any, deep: bool, overrides: Any, main: bool) -> dict[str, Any]:
    if not isinstance(overrides, Mapping):
        return {}
    if spec.optional and not overrides:
        return {}
    cls = spec.config_class if spec.config_class.__name__ != "AutoConfig" else None
    model_type = overrides.get("model_type", spec.model_type)
    cls = cls or CONFIG_MAPPING[model_type]
    is_main = main and name in ("text_config", "llm_config", "language_config", "decoder", "encoder", "thinker_config")
    given = dict(spec.init_kwargs)
    return {name: _tiny(cls, deep, overrides, is_main, given)}


def _defaults(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The settings of a config class, with those that are made of others (``None``)."""
    found = {}
    for setting in dataclasses.fields(cls):
        made = setting.default_factory is not dataclasses.MISSING
        found[setting.name] = setting.default_factory() if made else setting.default
    return {name: value for name, value in found.items() if value is not dataclasses.MISSING}


def _kinds(cls: type[PreTrainedConfig], given: Mapping[str, Any]) -> dict[str, list[str]]:
    """The kinds of layers that a default config lists, by the name of the list, in their order."""
    try:
        default = cls()
    except Exception:
        return {}
    found: dict[str, list[str]] = {}
    for name in ("layer_types", "layers_block_type"):
        listed = getattr(default, name, None)
        if isinstance(listed, list | tuple) and listed and name in _defaults(cls):
            kinds = list(dict.fromkeys(listed))
            if "full_attention" in kinds and len(kinds) > 1:
                kinds = [*(kind for kind in kinds if kind != "full_attention"), "full_attention"]
            found[name] = kinds
    return found


def _layer_kinds(kinds: list[str], depth: int) -> list[str]:
    """Every kind in turn, each over as many layers as the depth allows."""
    return [kinds[i * len(kinds) // depth] if depth >= len(kinds) else kinds[i] for i in range(depth)]


def _small(name: str, value: Any, depth: int) -> Any:
    if name in ("sliding_window", "use_sliding_window"):
        return WINDOW if name == "sliding_window" else True
    if name == "max_window_layers":
        return depth // 2
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return 0.0 if re.search(r"drop|jitter|mask_(time|feature)_prob|noise", name) else value
    if isinstance(value, int):
        for pattern, rule in RULES:
            if re.fullmatch(pattern, name):
                small = rule(value, depth)
                return value if small == value else small
        return value
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        for pattern, rule in TUPLE_RULES:
            if re.fullmatch(pattern, name):
                return type(value)(rule(v, i) for i, v in enumerate(value))
    return value


def _to(number: int) -> Callable[[int, int], int]:
    return lambda value, depth: min(value, number) if value > 0 else value


def _exactly(number: int) -> Callable[[int, int], int]:
    return lambda value, depth: number


def _depth(value: int, depth: int) -> int:
    return depth if value > 0 else value


def _token(value: int, depth: int) -> int:
    """Special tokens stay apart: the first three as they are, the others behind the ordinary ones."""
    return value if 0 <= value < MIDDLE else MIDDLE + value % 16 if value >= 0 else value


RULES: list[tuple[str, Callable[[int, int], int]]] = [
    (r".*token_(id|index)|.*_(bos|eos|pad|start|end|newline|patch)_id|.*(boi|eoi|eoa|boa)_token.*", _token),
    (r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers|depth|"
     r"(encoder|decoder)_num_hidden_layers|num_hidden_groups_?|speech_(encoder|decoder)_layers|"
     r"t2u_(encoder|decoder)_layers|[lxr]_layers|num_blocks|conf_num_hidden_layers|num_transformer_layers", _depth),
    (r"(.*_)?(index_topk|index_n_heads|index_topk_blocks)", _to(4)),
    (r".*vocab(ulary)?_size(_.*)?|.*_hash_byte_group_vocab|num_embeddings", _to(WORDS)),
    (r"(.*_)?(codebook_size|num_codevectors_per_group)", _to(64)),
    (r"rotary_dim", _to(4)),
    (r"window_size", _to(4)),
    (r"(max_|n_|num_|.*_)?(position_embeddings|positions)|.*max_(source|target)_positions|n_ctx|"
     r".*max_position.*|seq_length|max_seq_len|max_2d_position_embeddings", _to(POSITIONS)),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|num_query_groups|multi_query_group_num)", _to(2)),
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads)|mamba_n_heads|num_memory_heads", _to(HEADS)),
    (r"(.*_)?(head_dim|d_kv|attention_head_dim|dim_head|d_head|kv_channels|attention_head_size|qk_nope_head_dim|"
     r"linear_(key|value)_head_dim|mamba_d_head|mamba_head_?dim)", _to(8)),
    (r"qk_rope_head_dim", _to(4)),
    (r"v_head_dim", _to(6)),
    (r"(.*_)?(q_lora_rank|kv_lora_rank|lora_rank|rank)", _to(12)),
    (r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|ffn_hidden_size|ffn_hidden_dim|mlp_dim|n_inner|"
     r"hidden_dim_ff|mlp_hidden_size|linear_units|dff|dim_ff|intermediate_size_mlp|feed_forward_hidden_size|"
     r"feedforward_dim|feed_forward_dim)", _to(INNER)),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", _to(4)),
    (r"(.*_)?(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts|"
     r"topk_experts)", _to(2)),
    (r"n_group|topk_group|num_expert_groups?|n_groups", _to(1)),
    (r"first_k_dense_replace|num_dense_layers", _to(1)),
    (r"num_nextn_predict_layers|num_kv_shared_layers", _exactly(0)),
    (r"(.*_)?(sliding_window|local_attention|attention_chunk_size|window_attention_size|local_attention_window_len|"
     r"sliding_window_size|keep_window_size|attention_window)", _to(WINDOW)),
    (r"(local|global)_radius|chunk_size|mamba_chunk_size|block_size|global_block_size|index_block_size", _to(8)),
    (r"image_size|max_image_size|spec_size|img_size|crop_size|input_size_image|resolution", _to(32)),
    (r"patch_size", lambda value, depth: 8 if value > 8 else value),
    (r"num_frames|num_frames_per_clip", _to(4)),
    (r"num_queries|num_object_queries|num_proposals|two_stage_num_proposals|num_denoising|"
     r"num_detection_tokens", _to(8)),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_dim|embedding_size|emb_size|projection_dim|hidden_dim|"
     r"proj_size|dim|width|channels|latent_dim|d_inner|output_size|num_filters|num_features|in_dim|out_dim|"
     r"fpn_feature_size|lru_width|state_size|d_state|hidden_channels|initial_channel|model_dim|d_ssm)", _to(WIDTH)),
    (r"num_mel_bins|feature_size_audio|num_mel|n_mels|mel_dim", _to(16)),
    (r"num_conv_pos_embeddings", _to(8)),
    (r"num_conv_pos_embedding_groups", _to(4)),
    (r"(.*_)?(num_latents|num_image_tokens|num_prompts|query_tokens|num_query_tokens|image_seq_length)", _to(8)),
]  # fmt: skip

TUPLE_RULES: list[tuple[str, Callable[[int, int], int]]] = [
    (r"depths|num_blocks|n_attn_blocks|block_sizes|encoder_depths", lambda v, i: 1 if v > 0 else v),
    (r"num_attention_heads|num_heads|encoder_num_heads", lambda v, i: 2**i),
    (r"hidden_sizes|embed_dims?|neck_hidden_sizes|encoder_hidden_sizes|dim_embed", lambda v, i: 16 * 2**i),
    (r"conv_dim|tdnn_dim", lambda v, i: 32),
    (r"image_size|img_size", lambda v, i: min(v, 32)),
]
