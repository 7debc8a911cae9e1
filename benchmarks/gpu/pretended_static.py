"""What a compiled step of a cache with ``max_length`` asks of a GPU, counted on the pretended one.

    python -m benchmarks.gpu.pretended_static

One layer of 32 query heads, 8 KV heads and a head dimension of 128, bfloat16, behind 1,024 tokens. A step is one call
of the operator ``static_attend``, as a graph calls it. Whether a page is due is decided by kernels, which are launched
at every step; so every step asks for the same. To be run in a process of its own, as :mod:`~benchmarks.gpu.pretended`.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NamedTuple

from benchmarks.gpu import pretended  # first: it takes Triton out of the interpreter

# isort: split
import torch

from benchmarks.gpu.pretended_device import DEVICE, PretendedDevice, current
from hf_kvcache.codecs import resolve
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.static import StaticLayer
from hf_kvcache.layers.static_ops import static_attend

_QUERY_HEADS, _HEADS, _DIM, _PROMPT, _MOST = 32, 8, 128, 1024, 4096


class Kind(NamedTuple):
    """A kind of layer."""

    codec: str
    window: int | None = None
    mask: torch.dtype | None = torch.bool
    batch: int = 1


KINDS = {
    "unbiased4": Kind("unbiased4"),
    "unbiased4, no mask": Kind("unbiased4", mask=None),
    "rotated8": Kind("rotated8"),
    "none": Kind("none"),
    "unbiased4, window, additive mask, batch of 2": Kind("unbiased4", 512, torch.bfloat16, 2),
}


def counts_of(kind: Kind) -> dict[str, dict[str, int]]:
    """The counts of a prompt and of a compiled step."""

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(kind.batch, length, heads, _DIM).bfloat16().to(DEVICE).transpose(1, 2)

    options = LayerOptions(resolve(kind.codec), 4, 128, 128, validate=False, deferred=False, max_length=_MOST)
    layer, scoring = StaticLayer(0, options, kind.window), Scoring(_DIM**-0.5)
    found: dict[str, dict[str, int]] = {}
    for name in ("first prompt", "prompt"):
        layer.reset()
        keys, values, query = random(_HEADS, _PROMPT), random(_HEADS, _PROMPT), random(_QUERY_HEADS, _PROMPT)
        with current().counting() as counted:
            layer.update(keys, values)
            layer.note_attended(AttentionCall(query, None, scoring))
        found[name] = dict(counted.own)
    del found["first prompt"]  # it makes the small tables of the device
    assert layer.tensors is not None
    mask = None if kind.mask is None else torch.ones(kind.batch, 1, 1, _MOST).to(DEVICE, kind.mask)
    new = random(_QUERY_HEADS, 1), random(_HEADS, 1), random(_HEADS, 1)
    for name in ("first step", "step"):
        with current().counting() as counted:
            static_attend(
                *new, mask, *layer.tensors, layer.tensors.state, layer.settings_key, True, scoring.scaling, None, None
            )
        found[name] = dict(counted.own)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uncompiled", action="store_true", help="count launches without compiling the kernels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pretended.install(not args.uncompiled)
    with PretendedDevice(), torch.no_grad():
        found: dict[str, Any] = {name: counts_of(kind) for name, kind in KINDS.items()}
    if not args.uncompiled:
        from benchmarks.machine_code import read_nvidia

        made = [(name, read_nvidia(each.asm["cubin"], each.metadata.shared)) for name, each in pretended.COMPILED]
        found["spilling"] = sorted({name for name, code in made if code.spills or code.stack})
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
