"""How a cache is measured: prefill, compress, then read what was compressed.

A single forward pass over a whole text attends to full-precision keys and values and never touches the compressed part
of a cache, so every method would seem lossless. Here a context is prefilled, which the cache compresses; every scored
token is then predicted by a decoding step that reads the compressed cache, the first one included: the last context
token is not prefilled but decoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hf_kvcache import HeavyHitterCache
from hf_kvcache.cache.prefill_recording import can_take_in
from hf_kvcache.integration.versions import with_cache
from hf_kvcache_eval.prefills import Prefill, Prefills

#: What stands before a context that is read again (KVzip, arXiv:2505.23416).
_REPEAT = "\n\nRepeat the previous context exactly.\n"


@dataclass(frozen=True)
class Protocol:
    """What is held equal when caches are compared.

    Attributes:
        sink_length: first tokens of each sequence in full precision.
        tail_length: newest tokens of each sequence in full precision.
        page_size: tokens of a page.
        block: tokens decoded at a time. Within a block the newest tokens are read in full precision, as they would be
            from the tail, and a page that falls due is packed behind the block: with a block well below the tail
            that changes the time it takes, and results by less than their noise.
        seed: of the methods that draw at random.
    """

    sink_length: int = 4
    tail_length: int = 128
    page_size: int = 128
    block: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("sink_length", 0), ("tail_length", 0), ("page_size", 8), ("block", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; accepted: whole numbers from {least}")


class Reader:
    """Sequences that were prefilled into one cache and are then decoded through it.

    Args:
        model: a causal language model of transformers.
        cache: an empty cache.
        block: tokens decoded at a time.
        rows: whether the cache can select and repeat its rows; otherwise it holds one sequence and forks are copies.
        prefills: what other caches prefilled with this model, to be taken over; None to run the model every time.
        tokenizer: the model's, to ask it to repeat where a policy reads a context again; None to let it read only.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        block: int = 1,
        rows: bool = True,
        prefills: Prefills | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.model, self.block, self.rows, self.prefills = model, block, rows, prefills
        self.tokenizer = tokenizer
        self.caches = [cache]
        self.mask: torch.Tensor | None = None
        #: Seconds of the compression behind the model's own pass, a second reading of the context included; None where
        #: it cannot be told from that pass.
        self.compress_seconds: float | None = 0.0

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Take in ``contexts``, left-padded where their lengths differ; a cache that evicts then evicts.

        Returns:
            The logits ``[B, vocabulary]`` after the last token; None if all contexts are empty.

        Raises:
            ValueError: if some contexts are empty and others are not, or there are several and the cache takes one.
        """
        lengths = [len(context) for context in contexts]
        width = max(lengths)
        if not self.rows and len(contexts) > 1:
            raise ValueError(f"{len(contexts)} contexts; this cache takes one at a time")
        device = self.model.device
        self.mask = torch.ones(len(contexts), width, dtype=torch.long, device=device)
        if width == 0:
            return None
        if min(lengths) == 0:
            raise ValueError("empty contexts must be prefilled apart from others")
        tokens = torch.zeros(len(contexts), width, dtype=torch.long, device=device)
        for row, context in enumerate(contexts):
            self.mask[row, : width - len(context)] = 0
            tokens[row, width - len(context) :] = torch.tensor(context, device=device)
        if self.prefills is None or not can_take_in(self.model.config, self.caches[0]):
            logits, found = self._forward(tokens, self.mask, self.caches[0], logits_to_keep=1)[:, -1], None
        else:
            found = self._shared(self.prefills, contexts, tokens, self.mask)
            logits = found.logits
        if isinstance(self.caches[0], HeavyHitterCache):
            started = time.perf_counter()
            self._compress(self.caches[0], tokens, found)
            self.compress_seconds = time.perf_counter() - started
        return logits

    def _compress(self, cache: HeavyHitterCache, tokens: torch.Tensor, found: Prefill | None) -> None:
        """Let ``cache``, which holds ``tokens [B, T]``, evict; a second reading of them is kept with their prefill."""
        kind = cache.policy.replay_by_head, cache.policy.replay_squares, cache.matches
        replayed = None if found is None else found.replayed.get(kind)
        if cache.policy.needs_replay and replayed is None:
            asked = None
            if self.tokenizer is not None:
                asked = self.tokenizer(_REPEAT, add_special_tokens=False, return_tensors="pt").input_ids[0]
            replayed = cache.replay(self.model, tokens, self.mask, asked)
            if found is not None:
                found.replayed[kind] = replayed
        cache.compress(replayed=replayed)

    def _shared(
        self, prefills: Prefills, contexts: Sequence[Sequence[int]], tokens: torch.Tensor, mask: torch.Tensor
    ) -> Prefill:
        """Take over the prefill of ``contexts``, made now if it is not there."""
        found = prefills.find(self.model, contexts)
        if found is None:
            found = prefills.make(
                self.model,
                contexts,
                mask,
                lambda cache: self._forward(tokens, mask, cache, logits_to_keep=1)[:, -1],
            )
        found.into(self.caches[0])
        return found

    def fork(self, counts: Sequence[int]) -> None:
        """Repeat row ``i`` ``counts[i]`` times, copies side by side; each then goes its own way."""
        assert self.mask is not None, "prefill first"
        if len(counts) != len(self.mask):
            raise ValueError(f"counts has {len(counts)} entries for {len(self.mask)} rows")
        index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts))).to(self.mask.device)
        if not self.rows:
            self.caches += [_copy(self.caches[0]) for _ in range(counts[0] - 1)]
        elif self.mask.shape[1] and list(counts) != [1] * len(counts):
            # An empty cache has no rows yet.
            # Not batch_select_indices(), which recurrent layers of transformers do not have.
            self.caches[0].reorder_cache(index)
        self.mask = self.mask[index]

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor, skip: int = 0) -> Iterator[torch.Tensor]:
        """Decode ``tokens [B, n]``; yields float32 logits ``[B, <= block, vocabulary]``, without the first ``skip``.

        Models with recurrent layers decode one token at a time.
        """
        assert self.mask is not None, "prefill first"
        # Some recurrent layers (Jamba's) begin anew with a block of several tokens, and read their state for one only.
        # What another library holds shows no layers.
        layers = getattr(self.caches[0], "layers", ())
        block = 1 if any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers) else self.block
        for chunk in tokens.to(self.mask.device).split(block, dim=1):
            self.mask = torch.cat([self.mask, self.mask.new_ones(chunk.shape)], 1)
            wanted = chunk.shape[1] - skip
            skip = max(0, -wanted)
            logits = self._decoded(chunk, self.mask, max(1, wanted))
            if wanted > 0:
                yield logits

    def _decoded(self, tokens: torch.Tensor, mask: torch.Tensor, wanted: int) -> torch.Tensor:
        """Logits ``[B, wanted, vocabulary]`` of the last of ``tokens [B, n]``, which the caches take in."""
        if self.rows:
            return self._forward(tokens, mask, self.caches[0], logits_to_keep=wanted).float()
        rows = [
            self._forward(tokens[i : i + 1], mask[i : i + 1], cache, logits_to_keep=wanted).float()
            for i, cache in enumerate(self.caches)
        ]
        return torch.cat(rows)

    @torch.inference_mode()
    def score(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode ``tokens [B, n]``.

        Args:
            tokens: what is decoded.
            targets: ``[B, m]``, the token after each of the last ``m`` tokens.

        Returns:
            The log-probability of each of ``targets``, and whether it was the likeliest token; both ``[B, m]``.
        """
        log_probs, greedy, at = [], [], 0
        for logits in self.logits(tokens, tokens.shape[1] - targets.shape[1]):
            wanted = targets[:, at : at + logits.shape[1]].to(logits.device)
            at += logits.shape[1]
            log_probs.append(logits.log_softmax(-1).gather(-1, wanted[..., None]).squeeze(-1))
            greedy.append(logits.argmax(-1) == wanted)
        return torch.cat(log_probs, 1), torch.cat(greedy, 1)

    @torch.inference_mode()
    def generate(
        self,
        tokens: torch.Tensor,
        count: int,
        stop: set[int],
        complete: Callable[[int, list[int]], bool] = lambda row, output: False,
    ) -> list[list[int]]:
        """Decode ``tokens [B, n]`` through the cache, then up to ``count`` tokens greedily.

        Args:
            tokens: what is decoded first.
            count: new tokens of each row, at most.
            stop: tokens that end a row.
            complete: told a row's number and its new tokens, says whether it needs no more of them.

        Returns:
            The new tokens of each row, without the one of ``stop`` that ended it.
        """
        assert self.mask is not None, "prefill first"
        out: list[list[int]] = [[] for _ in range(len(self.mask))]
        alive = [True] * len(out)
        for _ in range(count):
            for logits in self.logits(tokens):
                last = logits[:, -1]
            tokens = last.argmax(-1, keepdim=True)
            for row, token in enumerate(tokens[:, 0].tolist()):
                alive[row] = alive[row] and token not in stop
                if alive[row]:
                    out[row].append(token)
                    alive[row] = not complete(row, out[row])
            if not any(alive):
                break
        return out

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
        inputs: dict[str, Any] = {}
        if not bool(mask.all()):
            # forward() counts positions from the cache's length alone; only generate() looks at padding.
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            inputs = {"attention_mask": mask, "position_ids": positions}
        return self.model(tokens, use_cache=True, **with_cache(self.model, cache), **inputs, **options).logits


def _copy(cache: Any) -> Any:
    """A cache of transformers that goes its own way: its layers replace tensors and never write into them.

    ``deepcopy`` cannot copy quanto's tensors, and would double the bytes of all others.
    """
    other = copy(cache)
    other.layers = [copy(layer) for layer in cache.layers]
    return other
