"""What the general rules of :mod:`sweep.shrink` and :mod:`sweep.batches` don't get right."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def half(first: Any, second: Any) -> Callable[[int], list[Any]]:
    """One kind of layers in the first half, another in the second."""
    return lambda depth: [first] * (depth // 2) + [second] * (depth - depth // 2)


def _sections(*numbers: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(numbers)}


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
LINEAR = {"layer_types": half("linear_attention", "full_attention")}
CODES = {"codebook_size": 64}
SMALL_CONVOLUTIONS = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}
SWIN = {"window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}

# By model type, also of configs inside others; a callable is given the number of layers.
SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES | {"moving_average": 3, "label_length": 4},
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "bamba": MAMBA | {"attn_layer_indices": lambda depth: list(range(depth // 2, depth))},
    "granitemoehybrid": MAMBA | LINEAR,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": half("conv", "full_attention")},
    "lfm2_moe": {"layer_types": half("conv", "full_attention")},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 6},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_d_state": 8, "adapter_rank": 4},
    "gpt_neo": {"attention_types": lambda depth: [[["global", "local"], depth // 2]], "window_size": 6},
    "reformer": {
        "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (8, 24), "attn_layers": half("local", "lsh"),
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "feed_forward_size": 48, "hash_seed": 0,
        "num_buckets": 4, "max_position_embeddings": 128,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    "xlstm": {"qk_dim_factor": 0.5, "num_heads": 4, "chunk_size": 8},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "input_size": 32, "max_2d_position_embeddings": 64},
    "bros": {"hidden_size": 64}, "bit": {"num_groups": 4},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": lambda depth: depth, "num_blocks": 1,
                  "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32},
    "mobilebert": {"hidden_size": 32, "intra_bottleneck_size": 16, "embedding_size": 16, "true_hidden_size": 16,
                   "normalization_type": "layer_norm"},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "first_k_dense_replace": 1},
    "swin": SWIN, "donut-swin": SWIN, "maskformer-swin": SWIN, "swinv2": SWIN,
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "phimoe": {"sliding_window": 6},
    "xmod": {"default_language": "en_XX"},
    "glm4v_text": {"rope_parameters": _sections(2, 1, 1)},
    "glm46v_text": {"rope_parameters": _sections(2, 1, 1)},
    "glm4v_moe_text": {"rope_parameters": _sections(2, 1, 1) | {"partial_rotary_factor": 1.0}},
    "glm_image_text": {"rope_parameters": _sections(2, 1, 1)},
    "glm_ocr_text": {"rope_parameters": _sections(2, 1, 1)},
    "qwen2_vl_text": {"rope_parameters": _sections(2, 1, 1)},
    "qwen2_5_vl_text": {"rope_parameters": _sections(2, 1, 1)},
    "paddleocr_vl_text": {"rope_parameters": _sections(2, 1, 1)},
    "cosmos3_edge_text": {"rope_parameters": _sections(2, 1, 1)},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                            "xdrope_section": [1, 1, 1, 1]}},
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "whisper": {"max_source_positions": 52}, "speech_to_text": {"max_source_positions": 128},
    "funnel": {"block_sizes": lambda depth: [depth // 2, depth - depth // 2], "d_head": 8},
    "efficientnet": SMALL_CONVOLUTIONS, "align_vision_model": SMALL_CONVOLUTIONS | {"hidden_dim": 80},
    "evolla": {"protein_encoder_config": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
                                          "num_attention_heads": 4}, "resampler_depth": 2},
    "owlvit_text_model": {"max_position_embeddings": 64}, "owlv2_text_model": {"max_position_embeddings": 64},
    "siglip2_vision_model": {"num_patches": 16},
    "fsmt": {"src_vocab_size": 96, "tgt_vocab_size": 96},
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4, "position_bias_num_buckets": 16},
    "beit": {"use_relative_position_bias": True, "use_absolute_position_embeddings": False},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "canine": {"local_transformer_stride": 8, "downsampling_rate": 2, "num_hash_buckets": 64},
    "yoso": {"num_hash": 4, "use_expectation": True},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4},
    "vit_mae": {"mask_ratio": 0.0},
    "luke": {"entity_vocab_size": 32, "entity_emb_size": 16},
    "mluke": {"entity_vocab_size": 32, "entity_emb_size": 16},
    "mllama_text_model": {"cross_attention_layers": []},
    "idefics": {"cross_layer_interval": 1},
    "videomae": {"num_frames": 2, "tubelet_size": 2},
    "vivit": {"num_frames": 2, "tubelet_size": [2, 16, 16], "image_size": 32},
    "timesformer": {"num_frames": 2},
    "vjepa2": {"frames_per_clip": 2, "tubelet_size": 2, "crop_size": 32},
    "udop": {"d_model": 32, "image_size": 32},
    "encodec": CODES, "dac": CODES, "xcodec": CODES, "csm": CODES, "moshi": CODES,
    "mimi": CODES | {"upsample_groups": 8},
}  # fmt: skip


def _boxes(shape: Any) -> dict[str, Tensor]:
    text = shape.text()
    corners = torch.randint(0, 30, (*text["input_ids"].shape, 4), generator=shape.draw)
    corners[..., 2:] += corners[..., :2]
    return {**text, "bbox": corners}


def _boxes_of_floats(shape: Any) -> dict[str, Tensor]:
    text = shape.text()
    return {**text, "bbox": shape.normal(*text["input_ids"].shape, 4).abs()}


def _boxes_and_image(shape: Any) -> dict[str, Tensor]:
    return {**_boxes(shape), "pixel_values": shape.normal(shape.rows, 3, 32, 32)}


def _series(shape: Any) -> dict[str, Tensor]:
    config = shape.config
    past = config.context_length + max(config.lags_sequence)
    rows = shape.rows
    return {
        "past_values": shape.normal(rows, past), "past_time_features": shape.normal(rows, past, 1),
        "past_observed_mask": torch.ones(rows, past), "future_values": shape.normal(rows, config.prediction_length),
        "future_time_features": shape.normal(rows, config.prediction_length, 1),
    }  # fmt: skip


def _patched_series(shape: Any) -> dict[str, Tensor]:
    return {"past_values": shape.normal(shape.rows, shape.config.context_length, shape.config.num_input_channels)}


def _decisions(shape: Any) -> dict[str, Tensor]:
    rows, n, config = shape.rows, shape.width, shape.config
    return {
        "states": shape.normal(rows, n, config.state_dim), "actions": shape.normal(rows, n, config.act_dim),
        "rewards": shape.normal(rows, n, 1), "returns_to_go": shape.normal(rows, n, 1),
        "timesteps": torch.arange(n).expand(rows, n), "attention_mask": shape.mask(),
    }  # fmt: skip


def _perceived(shape: Any) -> dict[str, Tensor]:
    return {"inputs": shape.normal(shape.rows, shape.width, 32), "attention_mask": shape.mask()}


def _perceived_words(shape: Any) -> dict[str, Tensor]:
    text = shape.text()
    return {"inputs": text["input_ids"], "attention_mask": text["attention_mask"]}


def _patches(shape: Any) -> dict[str, Tensor]:
    side, config = 4, shape.config
    channels = shape.setting("num_channels", default=3) * shape.setting("patch_size") ** 2
    mask = shape.mask(tuple(16 - 3 * i for i in range(shape.rows)))
    del config
    return {
        "pixel_values": shape.normal(shape.rows, side * side, channels),
        "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[side, side]] * shape.rows),
    }  # fmt: skip


def _looked_at(shape: Any) -> dict[str, Tensor]:
    return {
        **shape.text(),
        "visual_feats": shape.normal(shape.rows, 4, 32),
        "visual_pos": shape.normal(shape.rows, 4, 4),
    }


# By model type or class: inputs that no rule gives.
EXTRAS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "bros": _boxes_of_floats,
    "lilt": _boxes,
    "layoutlm": _boxes,
    "layoutlmv3": _boxes_and_image,
    "autoformer": _series, "informer": _series, "time_series_transformer": _series,
    "patchtst": _patched_series, "patchtsmixer": _patched_series,
    "decision_transformer": _decisions,
    "PerceiverForMaskedLM": _perceived_words, "PerceiverForSequenceClassification": _perceived_words,
    "PerceiverModel": _perceived,
    "Siglip2VisionModel": _patches, "Siglip2ForImageClassification": _patches,
    "lxmert": _looked_at,
}  # fmt: skip
