"""The caches that can be measured: this package's and transformers' own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache, SparseReadCache, codecs
from hf_kvcache.cache.memory import tensor_bytes
from hf_kvcache.eviction import registry
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.specs import CacheSpec, parse

Make = Callable[[CacheSpec, PreTrainedConfig, Protocol], Any]
#: Dtypes that ``full:dtype=...`` can run the model in.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Environment variable: the folder with the files of ``hf-kvcache calibrate``.
PROJECTIONS_VARIABLE = "HF_KVCACHE_PROJECTIONS"
#: Other names of eviction policies.
POLICIES = {"window": "streaming"}
#: Of caches that evict, unless the protocol has less or the spec says otherwise: what is newest stays whatever its
#: worth, and the tail of the other caches would be all of a tenth of 1,024 tokens.
EVICTING_TAIL, EVICTING_PAGE = 8, 64


@dataclass(frozen=True)
class Kind:
    """What the harness has to know about a sort of cache.

    Attributes:
        make: builds an empty cache.
        help: one line for ``hf-kvcache-eval caches``.
        rows: takes left-padded batches and can repeat rows; otherwise it is given one sequence at a time.
        after_prefill: is compressed once, behind the prefill, so it cannot score a text from its first token.
        budget: needs a budget.
        ratio: may be given a share of the head dimension in a budget's place.
        codec: takes a codec behind a ``+``.
        queries: is shown the queries of a prefill, so that one it is to share must have kept them.
        shares_prefill: can take over a prefill that was made for another cache.
    """

    make: Make
    help: str
    rows: bool = True
    after_prefill: bool = False
    budget: bool = False
    ratio: bool = False
    codec: bool = False
    queries: bool = False
    shares_prefill: bool = True


def _full(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> DynamicCache:
    _only(spec, "dtype")
    return DynamicCache(config=config)


def _codec(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> KVCache:
    return KVCache(config, spec.name, **_lengths(spec, protocol))


def _quantized(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> KVCache:
    return QuantizedKVCache(config, **_lengths(spec, protocol))


def _grouped(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> QuantizedCache:
    backend = spec.name.rstrip("0123456789")
    options: dict[str, Any] = {"residual_length": protocol.tail_length} | spec.options
    return grouped_cache(backend, int(spec.name.removeprefix(backend)), config, **options)


def _peer_fp8(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> QuantizedCache:
    _only(spec)
    return QuantizedCache("fp8", config)


def _evicting(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> HeavyHitterCache:
    """A cache that evicts once, when the reader calls its ``compress()``; the spec's options can change that."""
    assert spec.budget is not None
    # A budget of a few tokens has no room for all of the sinks and the tail.
    room = spec.budget if spec.budget >= 1 else EVICTING_TAIL + protocol.sink_length
    sinks = min(protocol.sink_length, int(room))
    equal: dict[str, Any] = {
        "sink_length": sinks,
        "tail_length": min(EVICTING_TAIL, protocol.tail_length, int(room) - sinks),
        "page_size": min(EVICTING_PAGE, protocol.page_size),
        "evict_prefill": None,
        "interval": None,
        "seed": protocol.seed,
    }
    codec = {} if spec.codec is None else {"codec": spec.codec}
    policy = policy_name(spec.name)
    own: dict[str, Any] = dict(spec.options)
    assert policy is not None
    if "gate" in own:
        own["gate"] = calibrated_file("gate", str(own["gate"]))
    return HeavyHitterCache(config, budget=spec.budget, policy=policy, **(equal | codec | own))


def _sparse(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> SparseReadCache:
    """A cache that keeps everything; the budget is what a step reads."""
    assert spec.budget is not None
    codec = {} if spec.codec is None else {"codec": spec.codec}
    return SparseReadCache(config, spec.budget, **(codec | _lengths(spec, protocol)))


def _latent(spec: CacheSpec, config: PreTrainedConfig, protocol: Protocol) -> LatentKVCache:
    """Latents of a calibrated basis, whose file is looked for by name, so that no cell holds where it lies."""
    options = _lengths(spec, protocol)
    name = options.pop("projection", None)
    if name is not None:
        options |= {
            "projection": calibrated_file("projection", str(name)),
            "ratio": 1.0 if spec.budget is None else spec.budget,
        }
    return LatentKVCache(config, spec.codec, **options)


def calibrated_file(argument: str, name: str) -> Path:
    """The file of ``hf-kvcache calibrate`` called ``name``, given as ``argument``.

    Raises:
        ValueError: if it is not in the folder that ``HF_KVCACHE_PROJECTIONS`` names (default: ``projections``).
    """
    folder = Path(os.environ.get(PROJECTIONS_VARIABLE, "projections"))
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
        raise ValueError(
            f"{argument}={name!r} is not in ${PROJECTIONS_VARIABLE}; found there: {found}. Make one with "
            f"hf-kvcache calibrate --out {name}.safetensors"
        )
    return path


def _lengths(spec: CacheSpec, protocol: Protocol) -> dict[str, Any]:
    """The protocol's lengths, and the spec's own options over them."""
    equal = {
        "sink_length": protocol.sink_length,
        "tail_length": protocol.tail_length,
        "page_size": protocol.page_size,
    }
    return equal | spec.options


def kinds() -> dict[str, Kind]:
    """Every name that a spec may have; what the codec registry holds is found by itself."""
    ours = {
        name: Kind(_codec, f"this package's codec {name}", queries=_sees_queries(name))
        for codec in codecs.available()
        for name in [codec, *(spec for spec in codecs.specs() if spec.rstrip("0123456789") == codec)]
    }
    return {
        "full": Kind(_full, "transformers' DynamicCache; dtype=bfloat16 runs the model in it (the noise floor)"),
        "quantized": Kind(_quantized, "QuantizedKVCache: bits=, codec=, key_bits=, value_bits=", queries=True),
        **ours,
        **{name: _evicting_kind(name) for name in (*registry.available(), *POLICIES)},
        # transformers' quantized caches cannot repeat rows, and their fp8 scale is one per tensor, shared by all rows.
        **{
            f"{backend}{bits}": Kind(_grouped, f"transformers' QuantizedCache, {backend}, {bits} bits", rows=False)
            for backend in ("hqq", "quanto")
            for bits in (2, 4)
        },
        "latent": Kind(
            _latent,
            "LatentKVCache: the model's own latents, or @share of the head dimension with projection=NAME",
            ratio=True,
            codec=True,
            queries=True,
        ),
        "sparse": Kind(
            _sparse,
            "SparseReadCache: keeps all, a step reads @share of it; selector=NAME",
            budget=True,
            codec=True,
            queries=True,
        ),
        "hf-fp8": Kind(_peer_fp8, "transformers' QuantizedCache, fp8", rows=False),
    }


def _sees_queries(codec: str) -> bool:
    """Whether a codec scales keys by the queries of a prompt."""
    return codecs.resolve(codec).keys.format(64, 64, torch.float32).balanced


def kind_of(name: str) -> Kind | None:
    """The kind of a spec's name, wrapped policies (``ada-snapkv``) too; None for an unknown name."""
    known = kinds().get(name)
    return known if known or policy_name(name) is None else _evicting_kind(name)


def policy_name(name: str) -> str | None:
    """The eviction policy that a spec's name stands for, wrappers in front; None if it stands for none."""
    *outer, inner = name.split("-")
    inner = POLICIES.get(inner, inner)
    if inner not in registry.available() or not set(outer) <= set(registry.wrappers()):
        return None
    return "-".join([*outer, inner])


def _evicting_kind(name: str) -> Kind:
    policy = registry.resolve(policy_name(name) or name)
    what = (sys.modules[type(policy).__module__].__doc__ or name).partition("\n")[0].rstrip(".")
    # Who scores hidden states has to be there when the model reads.
    shares = not policy.needs_hidden
    return Kind(
        _evicting,
        f"evicts; {what}",
        after_prefill=True,
        budget=True,
        codec=True,
        queries=True,
        shares_prefill=shares,
    )


class Method:
    """One side of a comparison: a cache spec that can be built for a model.

    Args:
        spec: the spec or its text.

    Raises:
        ValueError: for an unknown name or what the named cache does not take.
    """

    def __init__(self, spec: CacheSpec | str) -> None:
        self.spec = parse(spec) if isinstance(spec, str) else spec
        kind = kind_of(self.spec.name)
        if kind is None:
            wrapped = f"eviction policies with {'- or '.join(registry.wrappers())}- in front"
            raise ValueError(
                f"cache={self.spec.text!r}: no cache {self.spec.name!r}; accepted: {', '.join(kinds())}, {wrapped}"
            )
        self.kind = kind
        if not self.kind.ratio and self.kind.budget != (self.spec.budget is not None):
            what = "needs" if self.kind.budget else "takes no"
            raise ValueError(f"cache={self.spec.text!r}: {self.spec.name} {what} budget ({self.spec.name}@0.3)")
        if self.spec.codec is not None and not self.kind.codec:
            raise ValueError(f"cache={self.spec.text!r}: {self.spec.name} takes no codec behind a +")
        dtype = self.spec.options.get("dtype")
        if self.spec.name == "full" and dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} of cache={self.spec.text!r}; accepted: {', '.join(DTYPES)}")

    def __str__(self) -> str:
        return self.spec.text

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the model is to have in this method; None for the one it was loaded in."""
        return DTYPES[str(self.spec.options["dtype"])] if self.full and "dtype" in self.spec.options else None

    @property
    def full(self) -> bool:
        """Whether this is transformers' own full cache."""
        return self.spec.name == "full"

    @property
    def queries(self) -> bool:
        """Whether this cache looks at the queries of a prefill."""
        if self.spec.name != "sparse":
            return self.kind.queries
        # Selectors look at the queries of steps only, an evicting cache and a codec that scales keys at those of a
        # prefill too.
        return self.spec.codec is not None or not {"codec", "bits", "key_bits", "value_bits", "budget"}.isdisjoint(
            self.spec.options
        )

    def make(self, config: PreTrainedConfig, protocol: Protocol) -> Any:
        """An empty cache for a model of ``config``."""
        return self.kind.make(self.spec, config, protocol)


def grouped_cache(
    backend: str, bits: int, config: PreTrainedConfig, *, residual_length: int = 128, **options: Any
) -> QuantizedCache:
    """transformers' cache of group-wise integers, by ``"hqq"`` or ``"quanto"``, in groups of 64.

    Raises:
        ImportError: if the package of the backend is not installed.
    """
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    equal = {"q_group_size": 64, "residual_length": residual_length, **axes}
    return QuantizedCache(backend, config, nbits=bits, **(equal | options))


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds; for a KVCache what ``memory()`` says, tables and slack included."""
    if isinstance(cache, KVCache):
        return cache.memory().total
    return sum(tensor_bytes(vars(layer)) for layer in cache.layers)


def _only(spec: CacheSpec, *accepted: str) -> None:
    if unknown := sorted(set(spec.options) - set(accepted)):
        raise ValueError(f"cache={spec.text!r} has no option {unknown[0]!r}; accepted: {', '.join(accepted) or 'none'}")
