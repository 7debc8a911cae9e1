"""Recording the queries, keys and values of a model's attention layers while the model reads texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_kvcache.integration.binding import IMPLEMENTATION, bind, is_bound, unbind
from hf_kvcache.integration.placement import reads_on, refuse_tensor_parallel
from hf_kvcache.utils.processes import ALONE, Processes

#: Called with an attention module and its queries ``[1, Hq, n, Dk]``, keys ``[1, Hkv, n, Dk]`` and values
#: ``[1, Hkv, n, Dv]``. Keys and queries come after their rotary embedding, at positions ``0 .. n - 1``.
Record = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], None]


@torch.no_grad()
def record_attention(
    model: Any,
    texts: Iterable[str],
    tokenizer: Any,
    tokens: int,
    length: int,
    record: Record,
    advance: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Let a model read texts, and call ``record`` with the states of every attention layer.

    Args:
        model: a causal language model; of a vision-language model the text part is recorded.
        texts: read from the first one on until there are enough tokens.
        tokenizer: the model's.
        tokens: number of tokens that are read.
        length: number of tokens that are read at a time; each chunk starts at position 0.
        record: called once per layer and chunk.
        advance: called with the number of tokens of each chunk that has been read.
        processes: among which this one reads its share of the chunks, by turns; all are given the same texts.

    Raises:
        ValueError: if ``tokens`` or ``length`` is below 1, the texts have no token for any of the processes, or several
            processes share the model by tensor parallelism.
    """
    if min(tokens, length) < 1:
        raise ValueError(f"tokens={tokens!r}, length={length!r}; accepted: whole numbers from 1")
    refuse_tensor_parallel(model, "recording attention")
    found, device = False, reads_on(model)
    with _attention_recorded(model, record):
        for number, chunk in enumerate(_chunks(texts, tokenizer, tokens, length)):
            found = True
            if number % processes.count != processes.rank:
                continue
            # The head is left out: its logits over the vocabulary would be the largest tensor of all.
            getattr(model, "base_model", model)(input_ids=chunk.to(device), use_cache=False)
            if advance is not None:
                advance(chunk.shape[1])
    if not found:
        raise ValueError(f"texts={texts!r:.60}; accepted: texts with at least one token")


@contextmanager
def _attention_recorded(model: Any, record: Record) -> Iterator[None]:
    """While it is open, every attention layer of the model's decoder hands its states to ``record``."""
    config = model.config.get_text_config(decoder=True)
    bound_before = is_bound(config)
    attention_function = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def recording(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if module.config is config:
            record(module, query, key, value)
        return attention_function(module, query, key, value, *args, **kwargs)

    # A bound model calls the package's own attention function with its queries, whichever implementation it had before.
    bind(config)
    AttentionInterface.register(IMPLEMENTATION, recording)
    try:
        yield
    finally:
        AttentionInterface.register(IMPLEMENTATION, attention_function)
        if not bound_before:
            unbind(config)


def _chunks(texts: Iterable[str], tokenizer: Any, tokens: int, length: int) -> Iterator[torch.Tensor]:
    """Token ids ``[1, n]`` with ``n`` up to ``length``, ``tokens`` in all."""
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        tokens -= ids.shape[1]
        yield from (chunk for chunk in ids.split(length, dim=1) if chunk.shape[1])
        if tokens <= 0:
            return
