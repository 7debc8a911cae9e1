"""The demo: one question over a long text, answered with the full cache and with several compressed ones.

The prompt is prefilled and packed. Then the full cache's own answer is fed token by token, so that each distribution
that is compared comes from attention over the packed pages.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import Cache, DynamicCache

from hf_kvcache.cli.demo_display import Bar, Measurement, build_table, build_texts, progress_bars
from hf_kvcache.cli.demo_options import ANSWER_TOKENS, CACHES, DEFAULT_CACHES, FULL, PROMPT_TOKENS
from hf_kvcache.cli.models import load_default_model, quiet_transformers
from hf_kvcache.cli.reading import check_context, decoded, kl_by_token, read_prompt, top1_agreement
from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache.integration.versions import CACHE_ARGUMENT

QUESTION = "In the story above, what was the label on the little bottle that Alice found on the table?"


@dataclass(frozen=True)
class Generation:
    """A greedy answer.

    Attributes:
        tokens: its tokens ``[n]``.
        logits: the raw logits ``[n, vocabulary]``.
        seconds: the time that it took.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer, the last token of the prompt included."""
        return len(self.tokens) / self.seconds


def run_demo(
    model_name: str | None = None,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    cache_names: Sequence[str] | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    device: str | None = None,
) -> list[Measurement]:
    """Run the demo and print its table and texts.

    Args:
        model_name: Hub id or local path; ``None`` means the packaged SmolLM2-135M-Instruct.
        max_new_tokens: Length of the answer at most.
        cache_names: Names of ``CACHES``; ``None`` for ``DEFAULT_CACHES``. The full cache always runs first.
        prompt_tokens: How many tokens of the text are put before the question.
        device: Where to run; ``None`` means the CPU.

    Returns:
        The measurements in the order of the table, the full cache first.
    """
    cache_names = DEFAULT_CACHES if cache_names is None else cache_names
    unknown = [name for name in cache_names if name not in CACHES]
    if unknown:
        raise ValueError(f"cache_names holds {unknown}; accepted are {list(CACHES)}")
    for name, value in (("max_new_tokens", max_new_tokens), ("prompt_tokens", prompt_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    console = Console()
    model, tokenizer = load_default_model(model_name, device=device)
    input_ids = build_prompt(tokenizer, prompt_tokens).to(model.device)
    check_context(model, input_ids.shape[1] + max_new_tokens, "lower prompt_tokens")
    console.print(f"prompt: {input_ids.shape[1]:,} tokens, Alice's Adventures in Wonderland and a question")
    with quiet_transformers(), progress_bars(console) as progress, torch.no_grad():
        rows = measure(model, tokenizer, input_ids, cache_names, max_new_tokens, progress)
    console.print(build_table(rows))
    console.print(build_texts(QUESTION, rows))
    return rows


def build_prompt(tokenizer: Any, prompt_tokens: int) -> torch.Tensor:
    """The first ``prompt_tokens`` tokens of the shipped text and the question, as ids ``[1, T]``."""
    text, _ = packaged_text()
    ids = tokenizer(text, add_special_tokens=False).input_ids[:prompt_tokens]
    content = f"{tokenizer.decode(ids)}\n\n{QUESTION}"
    if tokenizer.chat_template is None:
        return tokenizer(f"{content}\n\nAnswer:", return_tensors="pt").input_ids
    messages = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids


def measure(
    model: Any,
    tokenizer: Any,
    input_ids: torch.Tensor,
    cache_names: Iterable[str],
    max_new_tokens: int,
    progress: Progress,
) -> list[Measurement]:
    """Measure the full cache, then each named cache against it."""
    # The full cache comes first, since a cache of this package binds the model's config to another attention function.
    full_cache = DynamicCache(config=model.config)
    bar = Bar(progress, FULL)
    read_prompt(model, input_ids[:, :-1], full_cache)  # decoding starts from the last token
    full = _generate(model, input_ids, full_cache, max_new_tokens, bar)
    rows = [_full_row(tokenizer, full_cache, full)]
    del full_cache
    for name in cache_names:
        bar = Bar(progress, name)
        rows.append(_measure_one(model, tokenizer, input_ids, name, full, max_new_tokens, bar))
    return rows


def _measure_one(
    model: Any,
    tokenizer: Any,
    input_ids: torch.Tensor,
    name: str,
    full: Generation,
    max_new_tokens: int,
    bar: Bar,
) -> Measurement:
    cache = CACHES[name](model.config)
    read_prompt(model, input_ids[:, :-1], cache)
    # One prefill serves both. The fork shares the cache's pages, and decoding on it does not change `cache`.
    logits = _teacher_forced(model, input_ids, cache.fork(), full.tokens, bar)
    answer = _generate(model, input_ids, cache, max_new_tokens, bar)
    memory = cache.memory()
    return Measurement(
        name=name,
        bytes_held=memory.total,
        ratio=memory.ratio,
        bits_per_element=memory.bits_per_element,
        tokens_per_second=answer.tokens_per_second,
        agreement=top1_agreement(full.logits, logits),
        kl=kl_by_token(full.logits, logits).mean().item(),
        text=_decode(tokenizer, answer.tokens),
    )


def _teacher_forced(
    model: Any,
    input_ids: torch.Tensor,
    cache: Cache,
    tokens: torch.Tensor,
    bar: Bar,
) -> torch.Tensor:
    """Logits ``[n, vocabulary]`` of the ``n`` given tokens, decoded from ``cache`` one step each."""
    bar.start("fidelity", len(tokens))
    inputs = torch.cat([input_ids[0, -1:], tokens[:-1]])
    steps = []
    for logits, _ in decoded(model, inputs, cache):
        steps.append(logits)
        bar.advance()
    return torch.stack(steps)


def _generate(
    model: Any,
    input_ids: torch.Tensor,
    cache: Cache,
    max_new_tokens: int,
    bar: Bar,
) -> Generation:
    """The greedy answer, from a cache that holds all of the prompt but its last token."""
    bar.start("answer", max_new_tokens)
    start = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        streamer=bar,
    )
    seconds = time.perf_counter() - start
    tokens = output.sequences[0, input_ids.shape[1] :]
    return Generation(tokens, torch.cat(output.logits).float(), seconds)


def _full_row(tokenizer: Any, cache: DynamicCache, full: Generation) -> Measurement:
    # Hybrid models have layers without keys and values.
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    held = [tensor for tensor in tensors if tensor is not None]
    return Measurement(
        name=FULL,
        bytes_held=sum(tensor.untyped_storage().nbytes() for tensor in held),
        ratio=1.0,
        bits_per_element=8.0 * held[0].element_size(),
        tokens_per_second=full.tokens_per_second,
        agreement=1.0,
        kl=0.0,
        text=_decode(tokenizer, full.tokens),
    )


def _decode(tokenizer: Any, tokens: torch.Tensor) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()
