"""What a step over latents and a chunk of queries ask of a GPU, counted on the pretended one.

    python -m benchmarks.gpu.pretended_parts

One layer, bfloat16. A step has DeepSeek-V3's widths with 16 heads, for a batch of two, behind 1,000 tokens. A chunk has
64 queries of 32 query heads, 8 KV heads and a head dimension of 128, behind 2,048 tokens in pages. To be run in a
process of its own, as :mod:`~benchmarks.gpu.pretended`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.gpu.pretended import COMPILED, Counts, install

_RANK, _ROTARY, _WIDTH, _HEADS = 512, 64, 128, 16


def latent_step(bits: int | None) -> dict[str, int]:
    """The counts of a plain step of multi-head latent attention with such a cache."""
    from transformers import DeepseekV3Config
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    from hf_kvcache import LatentKVCache

    config = DeepseekV3Config(
        num_hidden_layers=1,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        kv_lora_rank=_RANK,
        qk_rope_head_dim=_ROTARY,
        qk_nope_head_dim=_WIDTH,
        v_head_dim=_WIDTH,
        hidden_size=64,
        q_lora_rank=64,
    )
    config._attn_implementation = "sdpa"
    module: Any = DeepseekV3Attention(config, 0).to(torch.bfloat16).eval()
    cache = LatentKVCache(config, bits=bits)
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    draw = torch.Generator().manual_seed(0)
    query, latents, rotary = (
        torch.randn(2, *shape, generator=draw).bfloat16()
        for shape in ((_HEADS, 1, _WIDTH + _ROTARY), (1, 1000, _RANK), (1, 1000, _ROTARY))
    )
    cache.update(latents, rotary, 0)

    def step() -> None:
        keys, values = module.expand_kv(*cache.update(latents[:, :, :1], rotary[:, :, :1], 0))
        function(module, query, keys, values, None, scaling=module.scaling)

    with torch.inference_mode():
        for _ in range(3):
            step()
        with Counts().counting() as found:
            step()
    return dict(found)


def chunk(codec: str) -> dict[str, int]:
    """The counts of 64 queries over pages of a codec."""
    from benchmarks.gpu.cases import Sizes, problem_of
    from hf_kvcache.kernels.attention import attend

    problem = problem_of(Sizes(codec, columns=16, slots=200, queries=64, positions=True), torch.device("cpu"), 0)
    attend(*problem.call)
    with Counts().counting() as found:
        attend(*problem.call)
    return dict(found)


def main() -> int:
    torch.set_num_threads(1)
    install()
    found: dict[str, Any] = {f"latents {bits}": latent_step(bits) for bits in (None, 8, 4)}
    found |= {f"chunk {codec}": chunk(codec) for codec in ("unbiased4", "rotated8")}
    from benchmarks.machine_code import read_nvidia

    made = [(name, read_nvidia(kernel.asm["cubin"], kernel.metadata.shared)) for name, kernel in COMPILED]
    found["spilling"] = sorted({name for name, code in made if code.spills or code.stack})
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
