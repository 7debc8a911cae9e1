"""How often evictions wait for a device, and what they send to it, found out without one.

    python -m benchmarks.gpu.waits                      counts of a prompt, a plain step and an eviction, as JSON
    python -m benchmarks.gpu.waits --policies h2o --where      and from which lines they come

The device is that of ``pretended_device.py``. Attention kernels are replaced, and the rest is torch, whose operators
compute true values there: what is kept is compared with what a layer on the CPU keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, cast

import torch

from benchmarks.gpu.pretended_device import DEVICE, KINDS, PretendedDevice

#: Sizes of the layer that is counted: pages, sinks, tail, budget and interval are small so that all of it happens soon.
HEADS, GROUP, DIM, PROMPT, STEPS = 2, 2, 16, 60, 10
_SIZES = {"budget": 32, "page_size": 8, "sink_length": 2, "tail_length": 4, "interval": 8}
#: Options that let short sequences show what a policy does.
_SMALL = {"window": 8, "lag": 8, "chunk": 16, "future": 16, "offset": 64, "length": 4, "tau": 0.01}


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
            found[moment] = {kind: counts.all[kind] for kind in KINDS[1:]} | {"where": counts.lines()}
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
    by_themselves = [name for name in names if not (resolve(name).waits or resolve(name).needs_hidden)]
    policies = args.policies or by_themselves
    found = {}
    with PretendedDevice() as device:
        for codec in args.codecs:
            Layers("snapkv", codec, False, DEVICE).count(device)  # what is asked for only once in a process
    for policy in policies:
        for codec in args.codecs:
            for padded in args.padded:
                plain = Layers(policy, codec, padded == "yes", torch.device("cpu"))
                plain.count(None)
                with PretendedDevice() as device:
                    there = Layers(policy, codec, padded == "yes", DEVICE)
                    counts = there.count(device)
                    counts["same"] = there.kept() == plain.kept()
                if not args.where:
                    counts = {k: v if k == "same" else {n: v[n] for n in v if n != "where"} for k, v in counts.items()}
                found[f"{policy} {codec}{' padded' if padded == 'yes' else ''}"] = counts
    print(json.dumps(found, indent=1 if args.where else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
