"""Generation that begins behind what is stored of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_kvcache.cache.base import KVCache
from hf_kvcache.integration.placement import reads_on
from hf_kvcache.integration.versions import CACHE_ARGUMENT, CACHE_NAMES, with_cache
from hf_kvcache.prompts import rows
from hf_kvcache.utils.validation import whole

#: Options of ``generate`` that have several sequences for one prompt.
_SEVERAL = ("num_beams", "num_return_sequences")
#: Options with which transformers reads the whole prompt again on top of a cache that has read it.
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


#: A prompt is read as a whole unless this share of it is stored: the first pass of an empty cache is the model's own.
_LEAST_SHARE = 1 / 16


class Store(Protocol):
    """What generation needs of a store."""

    joinable: bool

    def make_cache(self) -> KVCache: ...

    def fetch(self, input_ids: Any, *, least: int) -> tuple[KVCache, int]: ...

    def put(self, input_ids: Any, cache: KVCache) -> None: ...

    def put_each(self, prompts: Sequence[tuple[Any, KVCache]]) -> None: ...


def generate(
    store: Store,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    keep_reply: bool,
    checkpoints: Sequence[int],
    options: dict[str, Any],
) -> Any:
    """:meth:`hf_kvcache.prompts.PromptStore.generate`."""
    prompts = rows.prompts_of(input_ids, attention_mask)
    _check(model, prompts, keep_reply, checkpoints, options)
    if len(prompts) == 1:
        return _one(store, model, _on(model, prompts[0][None]), keep_reply, checkpoints, options, input_ids)
    if store.joinable:
        return _batch(store, model, prompts, keep_reply, options, input_ids)
    return _one_by_one(store, model, prompts, keep_reply, options, input_ids)


def _one(
    store: Store,
    model: PreTrainedModel,
    ids: torch.Tensor,
    keep_reply: bool,
    checkpoints: Sequence[int],
    options: dict[str, Any],
    given: torch.Tensor,
) -> Any:
    cache, length = store.fetch(ids, least=_least(ids.shape[1]))
    last = ids.shape[1] - 1
    for stop in [*sorted(n for n in set(checkpoints) if length < n < last), last]:
        if stop > length:
            _read(model, cache, ids[:, :stop], torch.ones_like(ids[:, :stop]), length)
            store.put(ids[:, :stop], cache)
            length = stop
    output = _generate(model, cache, ids, torch.ones_like(ids), options)
    if keep_reply:
        _keep(store, cache, _sequences(output)[0])
    return _behind(given, output, ids.shape[1])


def _batch(
    store: Store,
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    keep_reply: bool,
    options: dict[str, Any],
    given: torch.Tensor,
) -> Any:
    """A batch whose sequences each begin behind what is stored of them: padding stands before both parts.

    The columns are padding, what is stored, padding, and the rest of the prompt.
    """
    found = [store.fetch(ids, least=_least(len(ids))) for ids in prompts]
    lengths = [length for _, length in found]
    stored, rest = max(lengths), max(len(ids) - n for ids, n in zip(prompts, lengths, strict=True))
    ids = np.full((len(prompts), stored + rest), _pad_token(model), dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=np.int64)
    for row, (tokens, length) in enumerate(zip(prompts, lengths, strict=True)):
        for part, stop in ((tokens[:length], stored), (tokens[length:], stored + rest)):
            ids[row, stop - len(part) : stop], mask[row, stop - len(part) : stop] = part, 1
    cache = rows.join(store.make_cache(), [one for one, _ in found], lengths, stored) if stored else store.make_cache()
    all_ids, all_mask = _on(model, ids), _on(model, mask)
    last = stored + rest - 1
    if last > stored:
        _read(model, cache, all_ids[:, :last], all_mask[:, :last], stored)
        new = [row for row, tokens in enumerate(prompts) if len(tokens) - 1 > lengths[row]]
        store.put_each([(prompts[row][:-1], rows.take_out(cache, row)) for row in new])
    output = _generate(model, cache, all_ids, all_mask, options)
    if keep_reply:
        alone = [rows.take_out(cache, row) for row in range(len(prompts))]
        replies = _sequences(output)[:, stored + rest :].cpu().numpy()
        whole_rows = [np.concatenate(both) for both in zip(prompts, replies, strict=True)]
        # The last token was never read.
        store.put_each([(row[: one.get_seq_length()], one) for row, one in zip(whole_rows, alone, strict=True)])
    return _behind(given, output, stored + rest)


def _one_by_one(
    store: Store,
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    keep_reply: bool,
    options: dict[str, Any],
    given: torch.Tensor,
) -> torch.Tensor:
    """The sequences of a batch one after the other, for caches that cannot be put together."""
    replies = []
    for ids in prompts:
        one = _on(model, ids[None])
        replies.append(_one(store, model, one, keep_reply, (), options, one)[:, len(ids) :])
    several = replies[0].shape[0]
    longest = max(reply.shape[1] for reply in replies)
    padded = [torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=_pad_token(model)) for x in replies]
    return torch.cat([given.to(replies[0].device).repeat_interleave(several, 0), torch.cat(padded)], 1)


def _generate(
    model: PreTrainedModel, cache: KVCache, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> Any:
    """Generate behind a cache of ``ids`` but the last, which has one sequence for each prompt."""
    several = max(_option(model, options, name) for name in _SEVERAL)
    if several > 1 and cache.get_seq_length():
        # `generate` repeats the ids, and leaves a cache as it is. Recurrent layers can be reordered, but not repeated.
        cache.reorder_cache(torch.arange(ids.shape[0], device=ids.device).repeat_interleave(several))
    return _model(model).generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **options)


def _option(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """An option of ``generate``, from where it takes it; 1 if there is none."""
    return options.get(name, getattr(options.get("generation_config") or model.generation_config, name, 1)) or 1


@torch.no_grad()
def _read(model: PreTrainedModel, cache: KVCache, ids: torch.Tensor, mask: torch.Tensor, start: int) -> None:
    """Let the model read the tokens from ``start`` on."""
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"attention_mask": mask} if not bool(mask.all()) else {}
    if inputs and "position_ids" in takes:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:]
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    model(input_ids=ids[:, start:], **with_cache(model, cache), use_cache=True, **inputs)


def _keep(store: Store, cache: KVCache, tokens: torch.Tensor) -> None:
    """Keep a cache after what was generated; the last token was never read."""
    store.put(tokens[: cache.get_seq_length()], cache)


def _behind(given: torch.Tensor, output: Any, prompt: int) -> Any:
    """The output with the prompts as they were given, in place of the first ``prompt`` tokens."""
    sequences = _sequences(output)
    given = (given[None] if given.dim() == 1 else given).to(sequences)
    several = sequences.shape[0] // given.shape[0]
    whole_output = torch.cat([given.repeat_interleave(several, 0), sequences[:, prompt:]], 1)
    if sequences is output:
        return whole_output
    output.sequences = whole_output
    return output


def _least(tokens: int) -> int:
    return max(1, int(tokens * _LEAST_SHARE))


def _model(model: PreTrainedModel) -> Any:
    return model  # transformers' types take `generate` of a model for a tensor


def _sequences(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


def _on(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(ids).to(reads_on(model))


def _pad_token(model: PreTrainedModel) -> int:
    settings: Any = model.generation_config
    found = settings.pad_token_id if settings.pad_token_id is not None else settings.eos_token_id
    return int(found[0] if isinstance(found, list) else found or 0)


def _check(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    keep_reply: bool,
    checkpoints: Sequence[int],
    options: dict[str, Any],
) -> None:
    """Raise ValueError for options that do not go with a store."""
    for name, value in options.items():
        if name in (*CACHE_NAMES, "inputs", "inputs_embeds", "cache_implementation"):
            raise ValueError(f"{name}={type(value).__name__}: the store makes the cache and knows prompts by input_ids")
        if isinstance(value, torch.Tensor):
            raise ValueError(f"{name} of shape {list(value.shape)}: the store knows prompts by their token ids only")
    for name in _SEVERAL:
        value = _option(model, options, name)
        if keep_reply and value != 1:
            raise ValueError(f"keep_reply=True with {name}={value!r}; accepted: 1, since one reply follows a prompt")
    for name in _ASSISTED:
        given = options.get(name, getattr(options.get("generation_config") or model.generation_config, name, None))
        if given is not None:
            raise ValueError(f"{name}={given!r}: assisted generation reads the whole prompt again; accepted: None")
    for stop in checkpoints:
        whole("checkpoints", stop)
    if checkpoints and len(prompts) > 1:
        raise ValueError(f"checkpoints={list(checkpoints)!r} with {len(prompts)} prompts; accepted: a single prompt")
    if options.get("return_dict_in_generate") and len(prompts) > 1:
        raise ValueError("return_dict_in_generate=True with several prompts; accepted: False")
