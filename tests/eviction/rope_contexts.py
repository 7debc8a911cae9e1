"""Contexts with rotary positions, and what a float64 derivation needs to undo them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_kvcache.eviction import Context, Policy
from hf_kvcache.integration.rope import LayerRope, rope_of
from tests.eviction.contexts import KEY_DIM, SHAPES, random_context, shown

_BASE = 10000.0
#: Llama turns dimension ``i`` with ``i + D / 2``, all of them; GLM neighbours, and only half of the head.
FAMILIES = ("llama", "glm")
CASES = [(shape, family) for shape in SHAPES for family in FAMILIES if family == "llama" or shape == "ragged"]


def rotary_context(shape: str, family: str, policy: Policy) -> Context:
    """A context of that shape with the rotary embedding of a family, and what else the policy has asked for."""
    return replace(shown(random_context(SHAPES[shape]), policy), rope=rope(family))


def biased(ctx: Context) -> Context:
    """The same context whose keys stand for others already."""
    return replace(ctx, bias=torch.randn(ctx.positions.shape, generator=torch.Generator().manual_seed(0)))


@cache
def rope(family: str) -> LayerRope:
    arguments: dict[str, Any] = {
        "hidden_size": 4 * KEY_DIM,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": KEY_DIM,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "llama":
            return rope_of(LlamaAttention(transformers.LlamaConfig(**arguments), 0))
        return rope_of(GlmAttention(transformers.GlmConfig(**arguments), 0))


def planes(family: str) -> list[tuple[int, int, float]]:
    """Real dimension, imaginary dimension and frequency of each pair, from the definition of the family."""
    half = KEY_DIM // 2
    if family == "llama":
        return [(i, i + half, _BASE ** (-i / half)) for i in range(half)]
    turned = [(2 * i, 2 * i + 1, _BASE ** (-2 * i / half)) for i in range(half // 2)]
    return turned + [(half + i, half + half // 2 + i, 0.0) for i in range(half // 2)]


def rotation(family: str, position: float) -> np.ndarray:
    """``[D, D]``: ``rotation @ x`` is the vector ``x`` at that position."""
    matrix = np.zeros((KEY_DIM, KEY_DIM))
    for real, imaginary, frequency in planes(family):
        angle = position * frequency
        matrix[real, real] = matrix[imaginary, imaginary] = np.cos(angle)
        matrix[real, imaginary], matrix[imaginary, real] = -np.sin(angle), np.sin(angle)
    return matrix
