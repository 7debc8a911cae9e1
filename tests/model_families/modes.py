"""The modes of using a cache that every family is tried in.

A mode runs a model with caches that ``new`` makes, and returns logits. The reference is the same mode with
``DynamicCache``, or the mode's ``plain`` form, in which a new cache gets the same tokens and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_kvcache import KVCache, unbind
from tests.model_families.generating import Outcome, forward, generate, left_padded, prompt, read, steps
from tests.model_families.images import image_inputs, image_token, token_types

New = Callable[[], Cache]
Run = Callable[[PreTrainedModel, New], Outcome]


@dataclass(frozen=True)
class Mode:
    """A way of using a cache.

    Attributes:
        name: row of the results.
        run: the mode itself.
        plain: another way to compute the reference.
        loose: whether small changes of logits lead to other tokens at once (beams, sampling).
        alike: whether a quantized cache equals its plain form, since it packs the same pages.
        images: whether the mode needs a model that takes images.
    """

    name: str
    run: Run
    plain: Run | None = None
    loose: bool = False
    alike: bool = False
    images: bool = False


def _greedy(model: PreTrainedModel, new: New) -> Outcome:
    cache = new()
    outcome = generate(model, prompt(), cache, 20)
    _check_length(cache, 60 + 20 - 1)
    return outcome


def _check_length(cache: Cache, expected: int) -> None:
    seen = int(cache.get_seq_length())
    if isinstance(cache, KVCache) and seen < expected:  # some families add tokens of their own
        raise CacheNotUsed(f"the cache saw {seen} tokens of {expected}")


class CacheNotUsed(Exception):
    """The model ran, but not with the cache that it was given."""


_ROWS = (prompt(60), prompt(37, seed=1))


def _padded(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, left_padded(list(_ROWS)), new(), 12)


def _padded_plain(model: PreTrainedModel, new: New) -> Outcome:
    alone = [generate(model, row, new(), 12) for row in _ROWS]
    return Outcome(torch.cat([one.tokens for one in alone]), torch.cat([one.logits for one in alone]))  # type: ignore[misc]


def _beams(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(40), new(), 8, num_beams=3)


def _sampling(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(40, 2), new(), 8, do_sample=True, temperature=0.7)


def _lookup(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(20).repeat(1, 3), new(), 16, prompt_lookup_num_tokens=4)


def _lookup_plain(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(20).repeat(1, 3), new(), 16)


def _assisted(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(50), new(), 10, assistant_model=_assistant(model))


def _assisted_plain(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(50), new(), 10)


def _assistant(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, with noise in the output layer, so that some drafts are wrong."""
    unbind(model.config.get_text_config(decoder=True))
    other = deepcopy(model)
    head = other.get_output_embeddings()
    with torch.no_grad():
        head.weight.add_(0.03 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3)))
    return other


def _chunked(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(), new(), 8, prefill_chunk_size=16)


def _whole(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, prompt(), new(), 8)


def _continued(model: PreTrainedModel, new: New) -> Outcome:
    cache = new()
    first = generate(model, prompt(40), cache, 8)
    assert first.tokens is not None
    second = generate(model, torch.cat([prompt(40), first.tokens, prompt(9, seed=2)], 1), cache, 8)
    return _joined([first, second])


def _embeddings(model: PreTrainedModel, new: New) -> Outcome:
    return generate(model, {"inputs_embeds": model.get_input_embeddings()(prompt(50)).detach()}, new(), 8)


def _crop(model: PreTrainedModel, new: New) -> Outcome:
    cache, ids = new(), prompt()
    forward(model, ids[:, :48], cache)
    cache.activate_past_recording()
    forward(model, ids[:, 48:56], cache)
    cache.crop(-6)
    return Outcome(None, steps(model, prompt(8, seed=3), cache))


def _crop_plain(model: PreTrainedModel, new: New) -> Outcome:
    cache, ids = new(), prompt()
    forward(model, ids[:, :48], cache)
    forward(model, ids[:, 48:50], cache)
    return Outcome(None, steps(model, prompt(8, seed=3), cache))


def _batch(model: PreTrainedModel, new: New) -> Outcome:
    cache, ids = new(), prompt(40, 3)
    forward(model, ids, cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))  # type: ignore[arg-type]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    return Outcome(None, steps(model, prompt(8, 3, seed=4), cache))


def _batch_plain(model: PreTrainedModel, new: New) -> Outcome:
    cache = new()
    forward(model, prompt(40, 3)[[2, 0, 1]], cache)
    return Outcome(None, steps(model, prompt(8, 3, seed=4), cache))


def _copies(model: PreTrainedModel, new: New) -> Outcome:
    cache = new()
    forward(model, prompt(50), cache)
    copies = [cache, deepcopy(cache), cache.fork() if isinstance(cache, KVCache) else deepcopy(cache)]
    return Outcome(None, torch.cat([steps(model, prompt(6, seed=5 + i), copy) for i, copy in enumerate(copies)], 1))


def _copies_plain(model: PreTrainedModel, new: New) -> Outcome:
    logits = []
    for index in range(3):
        cache = new()
        forward(model, prompt(50), cache)
        logits.append(steps(model, prompt(6, seed=5 + index), cache))
    return Outcome(None, torch.cat(logits, 1))


def _state(model: PreTrainedModel, new: New) -> Outcome:
    cache = new()
    forward(model, prompt(50), cache)
    if isinstance(cache, KVCache):
        other = new()
        other.load_state_dict(cache.state_dict())  # type: ignore[attr-defined]
        cache = other
    return Outcome(None, steps(model, prompt(8, seed=6), cache))


def _state_plain(model: PreTrainedModel, new: New) -> Outcome:
    cache = new()
    forward(model, prompt(50), cache)
    return Outcome(None, steps(model, prompt(8, seed=6), cache))


def _unbound(model: PreTrainedModel, new: New) -> Outcome:
    """A cache that is read as dense tensors after the model was unbound."""
    cache = new()
    forward(model, prompt(50), cache)
    unbind(model.config.get_text_config(decoder=True))
    logits = [read(model, token, cache) for token in prompt(6, seed=8).split(1, 1)]
    return Outcome(None, torch.cat(logits, 1))


def _image(model: PreTrainedModel, new: New) -> Outcome:
    """A prompt with an image, and a second turn."""
    inputs, cache = image_inputs(model), new()
    first = generate(model, inputs, cache, 8)
    assert first.tokens is not None
    ids = torch.cat([inputs["input_ids"], first.tokens, prompt(9, seed=3)], 1)
    types = token_types(model, ids == image_token(model))
    return _joined([first, generate(model, {"input_ids": ids, **types}, cache, 8)])


def _joined(parts: list[Outcome]) -> Outcome:
    return Outcome(torch.cat([part.tokens for part in parts], 1), torch.cat([part.logits for part in parts], 1))  # type: ignore[misc]


MODES: tuple[Mode, ...] = (
    Mode("greedy", _greedy),
    Mode("padded batch", _padded, _padded_plain, alike=True),
    Mode("beams", _beams, loose=True),
    Mode("sampling", _sampling, loose=True),
    Mode("prompt lookup", _lookup, _lookup_plain),
    Mode("assisted", _assisted, _assisted_plain),
    Mode("chunked prefill", _chunked, _whole),
    Mode("continued", _continued),
    Mode("embeddings", _embeddings),
    Mode("image", _image, images=True),
    Mode("crop", _crop, _crop_plain),
    Mode("batch operations", _batch, _batch_plain, alike=True),
    Mode("copies", _copies, _copies_plain, alike=True),
    Mode("state dict", _state, _state_plain, alike=True),
    Mode("unbound", _unbound),
)
