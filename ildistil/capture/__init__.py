"""Run a model and record what objectives want of it.

A *tap* is a named thing an objective wants: ``hidden`` and ``attention`` (per layer), ``logits``, ``loss`` (the
model's own supervised loss), or the path of any submodule, whose output is then recorded. A :class:`Capture` owns one
model, records only the wanted layers, and leaves outputs and speed of the model as they were:

- hidden states come from forward hooks on the model's stack of layers;
- attention comes from the functions that transformers' ``AttentionInterface`` calls in each layer: during a run they
  record query, key and value (after rotary embedding, before dropout) and go on as ever, whatever the implementation
  (sdpa, eager, flash, flex). No attention map is ever requested from the model. A few families outside
  ``AttentionInterface`` are read by hooks on their projections.

What arrives is checked against the batch, and what only a run tells is learned from one: whether the model's layers put
tokens first, whether its attention is causal, and which label a row of its logits predicts.

Layers are numbered ``1..L``; ``hidden[0]`` is the embedding output, ``hidden[i]`` the output of layer ``i`` (before
any final norm of the model), ``attention[i]`` belongs to layer ``i``. An encoder-decoder has three stacks, named
``encoder``, ``decoder`` and ``cross`` (the decoder's attention to the encoder), each with layers of its own.
"""

from ildistil.attention import Attention
from ildistil.capture.activations import Activations, KnownTraits, Layers
from ildistil.capture.head import LazyLogits
from ildistil.capture.info import ModelInfo
from ildistil.capture.inputs import model_inputs, real_labels, separate_configs
from ildistil.capture.layers import find_layers, find_stacks, unwrapped
from ildistil.capture.run import Capture
from ildistil.capture.taps import Role, Tap, merged
from ildistil.functional.pooling import Pooling

__all__ = [
    "Activations",
    "Attention",
    "Capture",
    "KnownTraits",
    "Layers",
    "LazyLogits",
    "ModelInfo",
    "Pooling",
    "Role",
    "Tap",
    "find_layers",
    "find_stacks",
    "merged",
    "model_inputs",
    "real_labels",
    "separate_configs",
    "unwrapped",
]
