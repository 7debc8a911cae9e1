"""How often evictions wait for a device, and what they send to it, found out without one.

    python -m benchmarks.gpu.waits                      counts of a prompt, a plain step and an eviction, as JSON
    python -m benchmarks.gpu.waits --policies h2o --where      and from which lines they come

Tensors of a pretended device are tensors of the CPU in a wrapper that says it is elsewhere. So values are real, an
operator that mixes devices raises as it would on a GPU, and every copy between the devices is seen. What is not seen:
time, and waits inside of kernels. To be run in a process of its own, since the device is registered with torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: Operators whose result, or the shape of it, the host has to know.
_ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
_CHECKING = ("_linalg_check_errors", "is_nonzero", "_assert_async")
#: Operators that launch nothing though their result is no view.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "set_", "lift_fresh")
NAME = "pretended"


class Away(torch.Tensor):
    """A tensor of the pretended device."""

    content: torch.Tensor

    @staticmethod
    def __new__(cls, content: torch.Tensor) -> Away:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=torch.device(NAME, 0),
        )
        made.content = content
        return made

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.content.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *call: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{func}: tensors of the pretended device are used outside of it")


class PretendedDevice(TorchDispatchMode):
    """While it is active, the pretended device exists.

    Attributes:
        found: ``waits`` for the device, ``uploads`` that do not wait, ``operators`` that would launch something.
        where: the same by what it was and the line of the package that asked for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.found: Counter[str] = Counter()
        self.where: Counter[str] = Counter()

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Count what the block does."""
        self.found, self.where = Counter(waits=0, uploads=0, operators=0), Counter()
        yield self.found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        away = [x for x in given if isinstance(x, Away)]
        to = kwargs.get("device")
        made_there = to is not None and torch.device(to).type == NAME
        if made_there:
            kwargs["device"] = torch.device("cpu")
        if away or made_there:
            self._note(func, name, args, kwargs, given, away, made_there)
        known = {id(x.content): x for x in away}
        args, kwargs = tree_map(lambda x: x.content if isinstance(x, Away) else x, (args, kwargs))
        result = func(*args, **kwargs)
        stays = made_there or (away and (to is None or made_there) and not _into_host(name, given))

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else Away(x)

        return tree_map(wrapped, result) if stays else result

    def _note(
        self, func: Any, name: str, args: Any, kwargs: Any, given: list[Any], away: list[Any], made_there: bool
    ) -> None:
        """Count what an operator asks for; raises RuntimeError where it mixes devices."""
        host = [x for x in given if not isinstance(x, Away) and x.dim()]
        if name in ("_to_copy", "copy_"):
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if (name == "_to_copy" and not away) or (name == "copy_" and isinstance(args[0], Away) and host):
                self._count("waits" if blocking else "uploads", f"upload of {tuple(given[-1].shape)}")
            elif _into_host(name, given) or (kwargs.get("device") is not None and not made_there):
                self._count("waits", f"read-back of {tuple(given[-1].shape)}")
            else:
                self.found["operators"] += 1
            return
        if name in _ASKING or name in _CHECKING:
            self._count("waits", name)
        elif name.removesuffix("_") in ("index", "index_put", "_index_put_impl"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._count("waits", f"{name} by a mask")
                elif index is not None and not isinstance(index, Away):
                    self._count("waits", f"{name} by an index on the host")
        elif host and away:
            raise RuntimeError(f"{func}: tensors on the pretended device and on the host: {[x.shape for x in host]}")
        if not func.is_view and name not in _FREE:
            self.found["operators"] += 1

    def _count(self, kind: str, what: str) -> None:
        self.found[kind] += 1
        lines = [f for f in traceback.extract_stack() if "hf_kvcache/" in f.filename and "benchmarks" not in f.filename]
        asked = [f for f in lines if not f.filename.endswith("transfers.py")]
        place = f"{asked[-1].filename.split('hf_kvcache/')[-1]}:{asked[-1].lineno}" if asked else "elsewhere"
        self.where[f"{kind}: {what}, {place}"] += 1


def _into_host(name: str, given: list[Any]) -> bool:
    """Whether an operator copies from the device into a tensor of the host."""
    return name == "copy_" and not isinstance(given[0], Away)


def install() -> PretendedDevice:
    """Make the pretended device known to torch."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    module: Any = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    tensor = torch.tensor

    def of_data(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """As ``torch.tensor``, which makes a tensor on the host and copies it."""
        return tensor(data, **kwargs) if device is None else tensor(data, **kwargs).to(device)

    cast(Any, torch).tensor = of_data
    return PretendedDevice()


#: Sizes of the layer that is counted: pages, sinks, tail, budget and interval are small so that all of it happens soon.
HEADS, GROUP, DIM, PROMPT, STEPS = 2, 2, 16, 60, 10
_SIZES = {"budget": 32, "page_size": 8, "sink_length": 2, "tail_length": 4, "interval": 8}
#: Options that let short sequences show what a policy does.
_SMALL = {"window": 8, "lag": 8, "chunk": 16, "future": 16, "offset": 64}


class Layers:
    """Two attention layers that evict, given the same states; the second is counted.

    What is done once for all layers, such as reading a mask, the first one has done by then.

    Args:
        policy: name of the eviction policy.
        codec: name of the codec.
        padded: whether the first of two sequences begins with padding.
        device: where the states lie.
        **options: of the cache.
    """

    def __init__(self, policy: str, codec: str, padded: bool, device: torch.device, **options: Any) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaAttention

        from hf_kvcache import HeavyHitterCache
        from hf_kvcache.eviction.registry import option_names
        from hf_kvcache.integration.rope import rope_of

        config = LlamaConfig(
            num_hidden_layers=2,
            hidden_size=HEADS * GROUP * DIM,
            num_attention_heads=HEADS * GROUP,
            num_key_value_heads=HEADS,
            head_dim=DIM,
            intermediate_size=8,
            vocab_size=8,
        )
        small = {name: value for name, value in _SMALL.items() if name in option_names(policy)}
        self.cache = HeavyHitterCache(config, policy=policy, codec=codec, **cast(Any, {**_SIZES, **small, **options}))
        self.device, self.padded, self.batch = device, padded, 2 if padded else 1
        self.modules = []
        for index in range(2):
            torch.manual_seed(0)
            module = LlamaAttention(config, index).requires_grad_(False)
            rope_of(module)
            for part in module.modules():
                held = cast(Any, part._parameters)
                held.update({name: x.data.to(device) for name, x in held.items() if x is not None})
            rope_of(module).embedding(torch.zeros(1, 1, dtype=torch.int64, device=device))  # moves a copy there, once
            self.modules.append(module)
        draw = torch.Generator().manual_seed(0)
        shape = self.batch, PROMPT + STEPS, DIM
        self.states = [
            torch.randn(shape[0], heads, *shape[1:], generator=draw).to(device)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        ]

    @torch.no_grad()
    def run(self, start: int, stop: int, index: int, mask: torch.Tensor | None) -> None:
        """An update of one layer, and its attention."""
        from hf_kvcache.integration.attention_call import AttentionCall
        from hf_kvcache.kernels.inputs import Scoring

        layer: Any = self.cache.layers[index]
        query, keys, values = (x[:, :, start:stop] for x in self.states)
        self.cache.update(keys, values, index)
        call = AttentionCall(query, mask, Scoring(DIM**-0.5), module=self.modules[index])
        if stop - start > 1:
            layer.note_attended(call)  # something else has computed it
        else:
            layer.attend(call)
        layer.flush()

    def count(self, counter: PretendedDevice | None) -> dict[str, Any]:
        """What the second layer asks for: of a prompt, and of the last step that is plain, that evicts, that packs."""
        found: dict[str, Any] = {}
        for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
            mask = None
            if self.padded:
                mask = (torch.arange(stop) >= torch.tensor([[7], [0]])).to(self.device)
            self.run(start, stop, 0, mask)
            layer: Any = self.cache.layers[1]
            before = (0, 0) if start == 0 else (layer.evictor.evictions, layer.storage.table.version)
            if counter is None:
                self.run(start, stop, 1, mask)
                continue
            with counter.counting() as counts:
                self.run(start, stop, 1, mask)
            after = layer.evictor.evictions, layer.storage.table.version
            moment = "step" if after == before else "eviction" if after[0] > before[0] else "packing"
            moment = "prompt" if start == 0 else moment
            found[moment] = dict(counts) | {"where": dict(counter.where)}
        return found

    def kept(self) -> list[Any]:
        """The positions that the second layer holds."""
        return cast(Any, self.cache.layers[1]).kept_positions().tolist()


def even_attention(*call: Any) -> Any:
    """In place of attention kernels, which are not counted here: every key gets the same from every query."""
    from hf_kvcache.kernels.inputs import Attention

    query, pages, dense, _, _, sums = call
    batch, heads, count, dim = query.shape
    output = query.new_zeros(batch, count, heads, dim)
    total = query.new_zeros(batch, heads, count)
    if not sums:
        return Attention(output, total)
    even = query.new_full((batch, heads, 1), 0.01)
    paged = None
    if pages is not None:
        paged = even.expand(-1, -1, pages.columns * pages.layout.page_size)
    return Attention(output, total, paged, even.expand(-1, -1, dense.keys.shape[2]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", help="by default all that evict by themselves")
    parser.add_argument("--codecs", nargs="+", default=["none", "unbiased4"])
    parser.add_argument("--padded", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--where", action="store_true", help="print the lines too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_KVCACHE_BACKEND"] = "reference"  # on both devices alike
    from hf_kvcache.eviction import available, resolve
    from hf_kvcache.eviction.registry import wrappers
    from hf_kvcache.layers import attention

    cast(Any, attention).attend = even_attention
    names = [*available(), *(f"{name}-snapkv" for name in wrappers())]
    policies = args.policies or [name for name in names if not resolve(name).needs_replay]
    device, found = install(), {}
    with device:
        for codec in args.codecs:
            Layers("snapkv", codec, False, device.device).count(device)  # what is asked for only once in a process
    for policy in policies:
        for codec in args.codecs:
            for padded in args.padded:
                plain = Layers(policy, codec, padded == "yes", torch.device("cpu"))
                plain.count(None)
                with device:
                    there = Layers(policy, codec, padded == "yes", device.device)
                    counts = there.count(device)
                    counts["same"] = there.kept() == plain.kept()
                if not args.where:
                    counts = {k: v if k == "same" else {n: v[n] for n in v if n != "where"} for k, v in counts.items()}
                found[f"{policy} {codec}{' padded' if padded == 'yes' else ''}"] = counts
    print(json.dumps(found, indent=1 if args.where else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
