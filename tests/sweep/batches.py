"""Ragged batches of random inputs, by what a model's ``forward`` names."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sweep.shrink import MIDDLE

Batch = dict[str, Tensor]

SHORT, LONG = (4, 3), (26, 17, 21)  # tokens of the rows: a window or a chunk shows in the long one only
DECODED = {SHORT: (3, 5), LONG: (15, 22, 9)}  # of a decoder
LABELS = 3


def forward_names(model: nn.Module) -> set[str]:
    """The names of a model's inputs; what takes more than it names hands a mask down."""
    parameters = inspect.signature(model.forward).parameters
    more = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return set(parameters) | ({"attention_mask"} if more else set())


def candidates(model: nn.Module, head: str, lengths: tuple[int, ...], left: bool, extras: Any) -> Iterator[Batch]:
    """Batches that a model may take, the simplest one first."""
    names, draw = forward_names(model), torch.Generator().manual_seed(len(lengths))
    shape = Shape(model, head, lengths, left, draw)
    if extras is not None:
        yield shape.labelled(extras(shape))
        return
    text = shape.text() if "input_ids" in names else {}
    makers = {
        "pixel_values": shape.images, "input_features": shape.features, "input_values": shape.waves,
        "pixel_values_videos": shape.videos,
    }  # fmt: skip
    others = [make for name, make in makers.items() if name in names]
    if model.main_input_name in makers and model.main_input_name in names:
        for batch in makers[model.main_input_name]():
            yield shape.labelled(batch)
    if "grid_thw" in names:
        yield from shape.packed_images()
    if text:
        yield shape.labelled(text)
        if head == "seq2seq" and "decoder_input_ids" in names:
            yield {**text, **shape.read_and_said()}
    for make in others:
        for batch in make():
            yield shape.labelled({**text, **batch})


class Shape:
    """What the inputs of one batch have in common."""

    def __init__(
        self, model: nn.Module, head: str, lengths: tuple[int, ...], left: bool, draw: torch.Generator
    ) -> None:
        self.model, self.config, self.head = model, model.config, head
        self.lengths, self.left, self.draw = lengths, left, draw
        self.rows, self.width = len(lengths), max(lengths)
        self.names = forward_names(model)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of these settings that the config, or one inside it, has."""
        configs = [
            self.config,
            *(getattr(self.config, name) for name in self.config.sub_configs if hasattr(self.config, name)),
        ]
        configs += [getattr(c, n) for c in configs[1:] if c is not None for n in c.sub_configs if hasattr(c, n)]
        for name in names:
            for config in configs:
                if getattr(config, name, None) is not None:
                    return getattr(config, name)
        return default

    def mask(self, lengths: tuple[int, ...] | None = None, left: bool = False) -> Tensor:
        """Ones for real tokens."""
        lengths = lengths or self.lengths
        places = torch.arange(max(lengths))
        rows = [places >= max(lengths) - n if left else places < n for n in lengths]
        return torch.stack(rows).long()

    def words(self, rows: int, columns: int) -> Tensor:
        """Ordinary tokens."""
        vocabulary = self.config.get_text_config().__dict__.get("vocab_size") or self.setting(
            "vocab_size", "src_vocab_size", "encoder_vocab_size", default=64
        )
        low = 3 * MIDDLE if vocabulary > 4 * MIDDLE else 0
        return torch.randint(low, vocabulary, (rows, columns), generator=self.draw)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers."""
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64).to(self.dtype)

    def padding(self) -> int:
        """The padding token."""
        pad = self.setting("pad_token_id", default=0)
        return pad if isinstance(pad, int) and pad >= 0 else 0

    def text(self) -> Batch:
        """Tokens and their mask, and what a decoder reads."""
        mask = self.mask(left=self.left)
        ids = self.words(self.rows, self.width)
        eos = self.config.__dict__.get("eos_token_id")
        if getattr(self.config, "is_encoder_decoder", False) and isinstance(eos, int):
            ids[torch.arange(self.rows), mask.sum(1) - 1] = eos
        batch = {"input_ids": ids.masked_fill(mask == 0, self.padding()), "attention_mask": mask}
        return {**batch, **self.decoded()}

    def decoded(self) -> Batch:
        """What a decoder reads, unless labels say it."""
        if "decoder_input_ids" not in self.names or self.head != "base" or not self._coders():
            return {}
        mask = self.mask(DECODED[self.lengths])
        ids = self.words(*mask.shape)
        found = {"decoder_input_ids": ids.masked_fill(mask == 0, self.padding())}
        return {**found, "decoder_attention_mask": mask} if "decoder_attention_mask" in self.names else found

    def read_and_said(self) -> Batch:
        """What a decoder reads, and what it says, where it doesn't make the one of the other."""
        mask = self.mask(DECODED[self.lengths])
        ids = self.words(*mask.shape)
        labels = self.words(*mask.shape).masked_fill(mask == 0, -100)
        return {"decoder_input_ids": ids.masked_fill(mask == 0, self.padding()), "labels": labels}

    def packed_images(self) -> Iterator[Batch]:
        """Patches of all images one after the other."""
        size, channels = self.setting("patch_size", default=8), self.setting("in_channels", "num_channels", default=3)
        frames = self.setting("temporal_patch_size", default=1)
        grid = torch.tensor([[1, 4, 4]] * self.rows)
        name = "pixel_values" if "pixel_values" in self.names else "hidden_states"
        for features in ((channels * frames * size**2,), (channels, size, size), (channels * size**2,)):
            yield {name: self.normal(16 * self.rows, *features), "grid_thw": grid}

    def _coders(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def images(self) -> Iterator[Batch]:
        """Images."""
        size = self.setting("image_size", "img_size", "crop_size", "input_size", default=64)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = self.setting("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        frames = self.setting("num_frames", "frames_per_clip")
        shapes = [(self.rows, channels, height, width)]
        if frames:
            shapes = [(self.rows, frames, channels, height, width), *shapes]
        for shape in shapes:
            yield {"pixel_values": self.normal(*shape)} | self._decoder_side()

    def videos(self) -> Iterator[Batch]:
        """Clips."""
        size = self.setting("image_size", "crop_size", default=32)
        frames = self.setting("num_frames", "frames_per_clip", default=4)
        yield {"pixel_values_videos": self.normal(self.rows, frames, 3, size, size)}

    def waves(self) -> Iterator[Batch]:
        """Sound, as samples; or spectrograms under that name."""
        samples = tuple(320 * n + 400 for n in self.lengths)
        mask = self.mask(samples)
        waves = self.normal(*mask.shape) * mask
        masked = {"attention_mask": mask} if "attention_mask" in self.names else {}
        yield {"input_values": waves, **masked, **self._decoder_side()}
        yield {"input_values": waves[:, None], **self._decoder_side()}
        bins = self.setting("num_mel_bins", "max_length", default=16)
        frames = self.setting("max_length", default=32)
        yield {"input_values": self.normal(self.rows, frames, bins)}

    def features(self) -> Iterator[Batch]:
        """Sound, as spectrograms."""
        bins = self.setting(
            "num_mel_bins",
            "input_feat_per_channel",
            "feature_size",
            "n_mels",
            "feature_projection_input_dim",
            "input_feat_size",
            "input_dim",
            default=16,
        )
        frames = tuple(4 * n for n in self.lengths)
        mask = self.mask(frames)
        name = next(
            (n for n in ("attention_mask", "input_features_mask", "feature_attention_mask") if n in self.names), None
        )
        masked = {name: mask} if name else {}
        yield {"input_features": self.normal(self.rows, max(frames), bins), **masked, **self._decoder_side()}
        positions = self.setting("max_source_positions", default=16)
        yield {"input_features": self.normal(self.rows, bins, 2 * positions), **self._decoder_side()}
        yield {"input_features": self.normal(self.rows, bins, max(frames)), **masked, **self._decoder_side()}
        yield {"input_features": self.normal(self.rows, 1, 4 * 16, bins), **self._decoder_side()}

    def _decoder_side(self) -> Batch:
        return self.decoded() if "input_ids" not in self.names else {}

    def labelled(self, batch: Mapping[str, Tensor]) -> Batch:
        """Add the labels of the head."""
        batch = dict(batch)
        if "labels" in self.names and "labels" not in batch:
            if self.head in ("texts", "images", "sounds"):
                batch["labels"] = torch.arange(self.rows) % LABELS
            elif self.head in ("masked", "causal", "seq2seq"):
                batch["labels"] = self._token_labels(batch)
        return batch

    def _token_labels(self, batch: Batch) -> Tensor:
        """Labels that have nothing to do with the tokens, so that a shift shows."""
        if self._coders() and self.head == "seq2seq":
            mask = self.mask(DECODED[self.lengths])
        else:
            mask = batch.get("attention_mask", self.mask(left=self.left))
            if mask.shape != batch.get("input_ids", mask).shape:
                mask = self.mask()
        labels = self.words(*mask.shape)
        if self.head == "masked":
            dropped = torch.rand(labels.shape, generator=self.draw) < 0.4
            labels = labels.masked_fill(dropped, -100)
        return labels.masked_fill(mask == 0, -100)
