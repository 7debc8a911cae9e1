"""What the commands that measure share: reading a prompt, decoding a given text through a cache, comparing, timing."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Cache

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.evicting import HeavyHitterCache
from hf_kvcache.cache.memory import layer_report
from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.integration.binding import bind, unbind
from hf_kvcache.integration.versions import with_cache

T = TypeVar("T")
#: What stands before a context that a policy reads again (KVzip, arXiv:2505.23416).
_REPEAT = "\n\nRepeat the previous context exactly.\n"


def timed(action: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of an action and the milliseconds that it took, work on a GPU included."""
    _finish(device)
    start = time.perf_counter()
    result = action()
    _finish(device)
    return result, 1e3 * (time.perf_counter() - start)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attend_as_with(model: Any, cache: Cache | None) -> None:
    """Let the model attend as it does for a user of this cache: caches that are not ours are not to be slowed down."""
    (bind if isinstance(cache, KVCache) else unbind)(decoder_config(model.config))


def check_context(model: Any, tokens: int, advice: str) -> None:
    """Raise ValueError if the tokens are more than the positions that the model was trained for."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"this takes {tokens:,} tokens, the model takes {limit:,}; {advice}")


def check_folder(name: str, path: str) -> None:
    """Raise ValueError if the file of the option ``name`` could not be written, before anything is measured."""
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--{name}={path!r}: there is no such folder")


def check_matplotlib(name: str) -> None:
    """Raise RuntimeError if the option ``name`` needs a package that is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"--{name} needs matplotlib; install it with: pip install matplotlib")


def check_picture(name: str, path: str) -> None:
    """The same for a picture, whose kind its ending says."""
    check_folder(name, path)
    check_matplotlib(name)
    from matplotlib.figure import Figure

    accepted = sorted(Figure().canvas.get_supported_filetypes())
    if (ending := Path(path).suffix.removeprefix(".") or "png") not in accepted:
        raise ValueError(f"--{name}={path!r} ends in {ending!r}; accepted: {', '.join(accepted)}")


def read_prompt(model: Any, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read the tokens ``ids [1, T]`` into ``cache``; returns the logits ``[1, 1, vocabulary]`` after the last one."""
    return model(ids, **with_cache(model, cache), use_cache=True, logits_to_keep=1).logits


def compress(model: Any, tokenizer: Any, ids: torch.Tensor, cache: Cache) -> None:
    """Let a cache evict that does so only when it is asked, such as those that read the prompt ``ids`` again."""
    if isinstance(cache, HeavyHitterCache) and cache.policy.waits:
        asked = tokenizer(_REPEAT, add_special_tokens=False, return_tensors="pt").input_ids[0]
        cache.compress(model, ids, prompt_ids=asked.to(ids.device))


def decoded(model: Any, tokens: torch.Tensor, cache: Cache) -> Iterator[tuple[torch.Tensor, float]]:
    """Decode the given ``tokens [n]`` one at a time; yields each one's logits ``[vocabulary]`` and milliseconds."""
    given = with_cache(model, cache)
    for token in tokens:
        ids = token.view(1, 1)
        output, took = timed(lambda ids=ids: model(ids, **given, use_cache=True), tokens.device)  # type: ignore[misc]
        yield output.logits[0, -1].float(), took


def kl_by_token(full_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(full || other) in nats of each of the distributions ``[n, vocabulary]``, ``[n]``."""
    # In float64, since at 8 bits the sum is near the rounding error of float32.
    full_log_probs = full_logits.double().log_softmax(-1)
    log_probs = logits.double().log_softmax(-1)
    return (full_log_probs.exp() * (full_log_probs - log_probs)).sum(-1)


def top1_agreement(full_logits: torch.Tensor, logits: torch.Tensor) -> float:
    """Share of positions at which both distributions have the same most likely token."""
    return (full_logits.argmax(-1) == logits.argmax(-1)).double().mean().item()


def held_bytes(cache: Cache) -> int:
    """Bytes that a cache holds, ours or one of transformers'."""
    return sum(layer_report(layer).total for layer in cache.layers)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole: whoever reads it meanwhile, or after an interruption, finds the old one or the new."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_bytes(content)
    scratch.replace(path)
