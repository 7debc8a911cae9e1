"""What a step over latents and a chunk of queries ask of a GPU, counted on the pretended one.

    python -m benchmarks.gpu.pretended_parts

One layer, bfloat16. A step has DeepSeek-V3's widths with 16 heads, for a batch of two, behind 1,024 tokens. A chunk has
64 queries of 32 query heads, 8 KV heads and a head dimension of 128, behind 2,048 tokens in pages. To be run in a
process of its own, as :mod:`~benchmarks.gpu.pretended`.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.gpu import pretended  # first: it takes Triton out of the interpreter

# isort: split
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.cases import Sizes, problem_of
from benchmarks.gpu.methods import latent_module
from benchmarks.gpu.pretended_device import DEVICE, PretendedDevice, current, moved
from hf_kvcache import LatentKVCache
from hf_kvcache.kernels.attention import attend

_RANK, _ROTARY, _WIDTH, _HEADS = 512, 64, 128, 16


def latent_step(bits: int | None) -> dict[str, int]:
    """The counts of a plain step of multi-head latent attention with such a cache."""
    plain, config = latent_module(_HEADS, _RANK, _ROTARY, _WIDTH)
    module: Any = moved(plain.bfloat16())
    cache = LatentKVCache(config, bits=bits)
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    query, latents, rotary = (
        torch.randn(2, *shape).bfloat16().to(DEVICE)
        for shape in ((_HEADS, 1, _WIDTH + _ROTARY), (1, 1024, _RANK), (1, 1024, _ROTARY))
    )
    cache.update(latents, rotary, 0)

    def step() -> None:
        keys, values = module.expand_kv(*cache.update(latents[:, :, :1], rotary[:, :, :1], 0))
        function(module, query, keys, values, None, scaling=module.scaling)

    # The fourth token completes a page.
    for _ in range(8):
        step()
    with current().counting() as found:
        step()
    return dict(found.own)


def chunk(codec: str) -> dict[str, int]:
    """The counts of 64 queries over pages of a codec."""
    problem = problem_of(Sizes(codec, columns=16, slots=200, queries=64, positions=True), DEVICE, 0)
    attend(*problem.call)
    with current().counting() as found:
        attend(*problem.call)
    return dict(found.own)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uncompiled", action="store_true", help="count launches without compiling the kernels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pretended.install(not args.uncompiled)
    with PretendedDevice():
        found: dict[str, Any] = {f"latents {bits}": latent_step(bits) for bits in (None, 8, 4)}
        found |= {f"chunk {codec}": chunk(codec) for codec in ("unbiased4", "rotated8")}
    if not args.uncompiled:
        from benchmarks.machine_code import read_nvidia

        made = [(name, read_nvidia(each.asm["cubin"], each.metadata.shared)) for name, each in pretended.COMPILED]
        found["spilling"] = sorted({name for name, code in made if code.spills or code.stack})
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
