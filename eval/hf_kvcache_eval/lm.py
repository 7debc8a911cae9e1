"""lm-eval's model ``hf-kvcache``: its Hugging Face model, with the compressed part of a cache really read.

    lm_eval --model hf-kvcache --model_args pretrained=...,cache=quantized,bits=4 --tasks ...

lm-eval scores a text with one forward pass, which attends to keys and values as they are computed and never reads what
a cache compressed. Here the context but for its last token is prefilled, the cache compresses it, and every scored
token is predicted by a decoding step through the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from hf_kvcache.integration.versions import CACHE_ARGUMENT
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.lm_arguments import cache_spec, sort_out
from hf_kvcache_eval.lm_groups import Group, Request, batches, make_groups, right_padded
from hf_kvcache_eval.lm_share import Prefilled
from hf_kvcache_eval.prefills import Prefills
from hf_kvcache_eval.protocol import Protocol, Reader

logger = logging.getLogger(__name__)

#: Log-likelihood, and whether greedy decoding would have said the same.
Answer = tuple[float, bool]


@register_model("hf-kvcache")
class KVCacheLM(HFLM):
    """lm-eval's ``hf`` model with a KV cache of choice.

    Caches that hold one sequence at a time run with one, whatever ``batch_size`` says. A batch of ``loglikelihood``
    has about ``batch_size`` continuations; those of one context stay together, up to 16. Log-probabilities are taken
    in float32.

    Args:
        pretrained: hub id, local path, or a loaded model.
        cache: a cache spec (``hf-kvcache-eval caches`` lists them).
        budget: of caches that need one, where the spec does not say it.
        sink_length: tokens at the start of each sequence in full precision.
        tail_length: newest tokens of each sequence in full precision.
        page_size: tokens of a page.
        block: tokens decoded at a time while a continuation is scored.
        seed: of the caches that draw at random.
        single_pass: score and generate as lm-eval's ``hf`` does, which is the same thing where nothing is compressed.
            None: for ``cache=full`` only; False: decode through the full cache too (at most 1.5e-5 nats per
            token from one pass, with SmolLM2-135M in float32 over 20 documents of each of five tasks).
        **arguments: those of lm-eval's ``hf``; all others are options of the cache (``bits=4``, ``key_axis=token``).

    Raises:
        ValueError: for an unknown cache or option, before the model's weights are loaded, and for what a cache of
            choice cannot do.
    """

    def __init__(
        self,
        pretrained: Any,
        cache: str = "full",
        *,
        budget: float | int | None = None,
        sink_length: int = Protocol.sink_length,
        tail_length: int = Protocol.tail_length,
        page_size: int = Protocol.page_size,
        block: int = Protocol.block,
        seed: int = Protocol.seed,
        single_pass: bool | None = None,
        **arguments: Any,
    ) -> None:
        model_arguments, options = sort_out(arguments)
        self.method = Method(cache_spec(cache, budget, options))
        self.protocol = Protocol(sink_length, tail_length, page_size, block, seed)
        self.single_pass = _check_single_pass(self.method, single_pass)
        self.prefilled = Prefilled()
        self.prefills: Prefills | None = None
        if str(model_arguments.get("batch_size", 1)).startswith("auto"):
            raise ValueError(
                f"batch_size={model_arguments['batch_size']!r}; accepted: whole numbers from 1, since lm-eval's search "
                "for the largest batch runs without the cache"
            )
        if isinstance(pretrained, str):
            # lm-eval's own default is cuda, whether there is such a device or not.
            model_arguments.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
            model_arguments["dtype"] = _dtype(self.method, model_arguments.get("dtype", "auto"))
        else:
            _dtype(self.method, pretrained.dtype)
            self._check_options(pretrained.config)
        super().__init__(pretrained, **model_arguments)
        if self.backend != "causal":
            raise ValueError(f"backend={self.backend!r}; accepted: models with a decoder only")
        self._share_work()

    @property
    def batch_size(self) -> Any:
        """Sequences at a time."""
        return super().batch_size if self.method.kind.rows else 1

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model: the cache and the protocol too."""
        protocol = asdict(self.protocol) | {"single_pass": self.single_pass}
        return super().get_model_info() | {"cache": str(self.method), "cache_protocol": protocol}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in lm-eval's windows, decoded through the cache from their first token.

        Raises:
            ValueError: for a cache that compresses only what a prefill brought.
        """
        if self.single_pass:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        if self.method.kind.after_prefill:
            raise ValueError(
                f"cache={str(self.method)!r} compresses what a prefill brought, and loglikelihood_rolling scores a "
                "text from its first token; accepted: caches that compress while decoding"
            )
        texts = [self._windows(request.args[0]) for request in requests]
        answers = iter(self._loglikelihood_tokens([window for windows in texts for window in windows], disable_tqdm))
        totals = [sum(next(answers)[0] for _ in windows) for windows in texts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self.single_pass:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[int, Answer] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for batch in batches(make_groups(requests, self.max_length), override_bs or self.batch_size):
            for index, answer in self._score(batch):
                answers[index] = answer
                if requests[index][0] is not None:  # rolling windows are kept as whole texts
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(1)
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def _score(self, batch: Sequence[Group]) -> list[tuple[int, Answer]]:
        """Prefill each context once, fork it for its continuations and decode these; answers by request."""
        reader = self._reader()
        prefixes = [group.context[:-1] for group in batch]
        tokens, targets = right_padded(batch)
        with self._autocast():
            reader.prefill(prefixes)
            if prefixes[0]:
                self.prefilled.note(reader.caches[0], [len(prefix) for prefix in prefixes], len(prefixes[0]))
            reader.fork([len(group.members) for group in batch])
            log_probs, greedy = reader.score(tokens, targets)
        members = [member for group in batch for member in group.members]
        if not prefixes[0]:
            if self.method.kind.after_prefill:
                self._note_empty(len(members))
            for cache in reader.caches:
                rows = [len(tokens[0])] * (len(members) // len(reader.caches))
                self.prefilled.note(cache, rows, len(tokens[0]))
        return [
            (index, (float(log_probs[row, : len(said)].sum()), bool(greedy[row, : len(said)].all())))
            for row, (index, said) in enumerate(members)
        ]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        if self.single_pass:
            return super()._model_generate(context, max_length, stop, **kwargs)
        if kwargs.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams={kwargs['num_beams']!r} with cache={str(self.method)!r}; accepted: 1")
        mask = kwargs.pop("attention_mask").bool()
        lengths = mask.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError("a prompt has no token; accepted: at least one")
        # A prompt of one token has nothing that could be prefilled, and must not keep others from being compressed.
        single = lengths == 1
        width = context.shape[1]
        out = context.new_full((len(context), max_length), self.tokenizer.pad_token_id)
        for rows in (single.logical_not().nonzero()[:, 0], single.nonzero()[:, 0]):
            if not len(rows):
                continue
            padding = width - int(lengths[rows].max())
            some, seen = context[rows, padding:], mask[rows, padding:].long()
            cache = self._prefilled_cache(some, seen)
            options = {**kwargs, "attention_mask": seen, CACHE_ARGUMENT: cache}
            new = super()._model_generate(some, max_length - padding, stop, **options)[:, some.shape[1] :]
            out[rows, width : width + new.shape[1]] = new
        return out

    def _prefilled_cache(self, context: torch.Tensor, mask: torch.Tensor) -> Any:
        """A fresh cache that holds each row of ``context [B, T]`` but for its last token.

        So the first generated token reads the compressed cache, as all others do. Rows of one token leave it empty.
        """
        reader = self._reader()
        prefixes = [row[seen.bool()][:-1].tolist() for row, seen in zip(context, mask, strict=True)]
        if not any(prefixes):
            self._note_empty(len(prefixes))
            return reader.caches[0]
        with self._autocast():
            reader.prefill(prefixes)
        self.prefilled.note(reader.caches[0], [len(prefix) for prefix in prefixes], context.shape[1] - 1)
        return reader.caches[0]

    def _note_empty(self, count: int) -> None:
        """Say that there was nothing to compress when ``count`` sequences began."""
        self.prefilled.empty += count
        logger.warning(
            "cache=%r compressed nothing before the first scored or generated token of %d sequences, which begin with "
            "one token only",
            str(self.method),
            count,
        )

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        self._check_options(self.config)
        super()._create_model(*args, **kwargs)

    def _check_options(self, config: Any) -> None:
        try:
            self.method.make(config, self.protocol)
        except TypeError as error:
            raise ValueError(f"cache={str(self.method)!r}: {error}") from error

    def _reader(self) -> Reader:
        cache = self.method.make(self.model.config, self.protocol)
        prefills = self.prefills if self.method.kind.shares_prefill else None
        return Reader(self.model, cache, self.protocol.block, self.method.kind.rows, prefills, self.tokenizer)

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _windows(self, text: str) -> list[Request]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _share_work(self) -> None:
        """Take this process's part of the requests: HFLM splits work over processes only where it sees several GPUs."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes


def tasks_folder() -> Path:
    """The folder of the ``local_*`` tasks: in the installed package, or beside it in a clone.

    Raises:
        RuntimeError: if there is none.
    """
    package = Path(__file__).parent
    for folder in (package / "tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise RuntimeError(f"no folder of tasks in or beside {package}; reinstall hf-kvcache")


def _check_single_pass(method: Method, single_pass: bool | None) -> bool:
    if single_pass not in (None, True, False):
        raise ValueError(f"single_pass={single_pass!r}; accepted: true, false")
    if single_pass and not method.full:
        raise ValueError(
            f"single_pass=True never reads what cache={str(method)!r} compressed; accepted: with cache=full"
        )
    return method.full if single_pass is None else single_pass


def _dtype(method: Method, dtype: Any) -> Any:
    """The dtype to load the model in: the spec's, where it names one."""
    if method.dtype is None:
        return dtype
    if dtype != "auto" and str(dtype).removeprefix("torch.") != str(method.dtype).removeprefix("torch."):
        raise ValueError(f"dtype={dtype!r} beside cache={str(method)!r}, which has another")
    return method.dtype
