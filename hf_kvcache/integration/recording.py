"""Letting a model read texts, and looking at what its attention layers are given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

#: Called with an attention module and its queries ``[1, Hq, n, Dk]``, keys ``[1, Hkv, n, Dk]`` and values
#: ``[1, Hkv, n, Dv]``, keys and queries after their rotary embedding at positions ``0 .. n - 1``.
Note = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], None]


def fingerprint(config: Any) -> dict[str, Any]:
    """What two models have in common if what was measured on one can be used for the other."""
    text: Any = config.get_text_config(decoder=True)
    return {
        "model_type": text.model_type,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "hidden_size": text.hidden_size,
        "rope": json.dumps(getattr(text, "rope_parameters", None), sort_keys=True, default=str),
    }


def check_model(made: str, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError unless what ``made`` names was made with a model that is ``known`` to be as ``wanted``."""
    for name, value in wanted.items():
        if known.get(name) != value:
            raise ValueError(f"the {made} was made with {name}={known.get(name)!r}, this model has {value!r}")


def load_file(path: str | Path, argument: str, kind: str, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata say that its format is ``kind``.

    Raises:
        ValueError: naming ``argument``, if the file is missing or no file of ``what``.
    """
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{argument}={str(path)!r} cannot be read: {error}") from error
    if known.get("format") != kind:
        raise ValueError(f"{argument}={str(path)!r} is no file of {what}")
    return tensors, known


@torch.no_grad()
def read(
    model: Any,
    texts: Iterable[str],
    tokenizer: Any,
    tokens: int,
    length: int,
    note: Note,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Show ``note`` what every attention layer of a model sees while the model reads texts.

    Args:
        model: a causal language model; of a vision-language model the text part is looked at.
        texts: read from the first one on until there are enough tokens.
        tokenizer: the model's.
        tokens: how many are read.
        length: tokens that are read at a time; each chunk starts at position 0.
        note: called once per layer and chunk.
        advance: called with the number of tokens of each chunk that has been read.

    Raises:
        ValueError: if ``tokens`` or ``length`` is below 1, or the texts have no token.
    """
    if min(tokens, length) < 1:
        raise ValueError(f"tokens={tokens!r}, length={length!r}; accepted: whole numbers from 1")
    found = False
    with _attention_seen(model, note):
        for chunk in _chunks(texts, tokenizer, tokens, length):
            # Without the head: its logits over the vocabulary would be the largest tensor of all.
            getattr(model, "base_model", model)(input_ids=chunk.to(model.device), use_cache=False)
            found = True
            if advance is not None:
                advance(chunk.shape[1])
    if not found:
        raise ValueError(f"texts={texts!r:.60}; accepted: texts with at least one token")


@contextmanager
def _attention_seen(model: Any, note: Note) -> Iterator[None]:
    # Not at the top: policies import what imports this file, and policies know nothing of models.
    from transformers import AttentionInterface

    from hf_kvcache.integration import attention
    from hf_kvcache.integration.binding import IMPLEMENTATION, bind, unbind

    config = model.config.get_text_config(decoder=True)
    bound_before = config._attn_implementation == IMPLEMENTATION

    def noting(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if module.config is config:
            note(module, query, key, value)
        return attention.attention_function(module, query, key, value, *args, **kw)

    # The package's own attention function stands between every bound model and its queries.
    bind(config)
    AttentionInterface.register(IMPLEMENTATION, noting)
    try:
        yield
    finally:
        attention.register()
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
