"""Running a model with a cache: whole generations, and forward passes step by step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_kvcache import KVCache, bind, unbind
from hf_kvcache.integration.versions import CACHE_ARGUMENT, with_cache
from tests.model_families.sizes import ORDINARY

PROMPT = 60


class Outcome(NamedTuple):
    """Generated tokens ``[B, n]`` and logits ``[B, n, V]``; ``tokens`` is None if they were given."""

    tokens: torch.Tensor | None
    logits: torch.Tensor


def prompt(length: int = PROMPT, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random ids ``[batch, length]`` without special tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, ORDINARY, (batch, length), generator=generator)


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One batch of prompts ``[1, n]`` of different lengths."""
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat([(torch.arange(length) >= length - row.shape[1]).long()[None] for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def prepare(model: PreTrainedModel, cache: Cache) -> None:
    """Bind the model for a KVCache and unbind it for others, so that the reference does not depend on this package."""
    (bind if isinstance(cache, KVCache) else unbind)(model.config.get_text_config(decoder=True))


def generate(model: PreTrainedModel, inputs: Any, cache: Cache, new: int, **options: Any) -> Outcome:
    """``new`` tokens, greedily by default."""
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    prepare(model, cache)
    torch.manual_seed(7)
    arguments = {"use_cache": True, "do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **options}
    run: Any = model.generate
    out = run(**inputs, **{CACHE_ARGUMENT: cache}, return_dict_in_generate=True, output_logits=True, **arguments)
    logits = torch.stack(out.logits, 1).float()
    return Outcome(out.sequences[:, -logits.shape[1] :], logits)


def forward(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits ``[B, T, V]`` of new tokens on top of what the cache holds."""
    prepare(model, cache)
    return read(model, ids, cache)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The same without binding or unbinding the model."""
    return model(input_ids=ids, use_cache=True, **with_cache(model, cache)).logits.float()


def steps(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits of the tokens ``ids``, one forward pass for each."""
    return torch.cat([forward(model, token, cache) for token in ids.split(1, 1)], 1)
