"""A decode step of a latent-attention layer with an indexer: only the picked latents read, or all under a mask.

Part of ``benchmarks.bench_latent``. The module is DeepSeek-V3.2's attention with 16 of its 128 heads, an indexer of
64 heads of width 128, and latents of 512 with rotary keys of 64; batch of 1, random weights, and tokens picked at
random for *step*. *step* is from ``update`` to the attention output and includes the model's operations on its mask;
*layer* is the whole attention module, with the scores of its indexer.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import DeepseekV32Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

from benchmarks import exact
from benchmarks.methods import DTYPES
from benchmarks.tables import Row
from benchmarks.timing import Clock, take_turns
from hf_kvcache import LatentKVCache
from hf_kvcache.integration.attention import attention_function
from hf_kvcache.integration.padding import Padding, attach_padding
from hf_kvcache.integration.picks import PickedIndices
from hf_kvcache_eval.caches import held_bytes

_HIDDEN = 2048
_WARM_UP, _LEAST_ROUNDS = 2, 5
#: Tokens past the nominal number, as in ``bench_latent``.
_OFFSET = 40
_TOLERANCES = {8: 1e-2, 4: 1e-1}


def make_config(picked: int, heads: int) -> DeepseekV32Config:
    """One layer of DeepSeek-V3.2 with that many heads, whose indexer picks so many tokens."""
    config = DeepseekV32Config(
        hidden_size=_HIDDEN, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=1
    )
    config.index_topk = picked
    config._attn_implementation = "sdpa"
    return config


class IndexedMethod:
    """One attention module with a cache of its own; modules of different methods share their weights.

    Args:
        weights: the module whose weights it takes.
        bits: of the latents; None for full precision.
        picks: whether only the picked latents are read.
        held: latents ``[1, 1, T, r]``, rotary keys ``[1, 1, T, dr]`` and keys of the indexer ``[1, T, d]``.
    """

    def __init__(
        self, weights: DeepseekV32Attention, bits: int | None, picks: bool, held: tuple[torch.Tensor, ...]
    ) -> None:
        config = make_config(weights.indexer.index_topk, weights.num_heads)
        self.cache = LatentKVCache(config, bits=bits)
        layer: Any = self.cache.layers[0]
        layer.reads_picked = self.picks = picks
        with torch.device("meta"):
            self.module = DeepseekV32Attention(config, 0).eval()
        self.module.load_state_dict(weights.state_dict(), assign=True)
        self.cache.update(held[0], held[1], 0)
        self.key = held[2][:, -1:]
        self.cache.update_indexer(held[2], 0)
        self.attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, attention_function)

    def _causal(self, tokens: int) -> torch.Tensor:
        """The mask of one query, which sees all tokens."""
        mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
        attach_padding(mask, Padding(None, tokens - 1, 1))
        return mask

    def step(self, query: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor, indices: torch.Tensor) -> Any:
        """Take in a token; attention of its query ``[1, H, 1, dn + dr]`` to the tokens ``indices [1, 1, k]``."""
        held = self.cache.update(latents, rotary, 0)
        keys, values = self.module.expand_kv(*held)
        self.cache.update_indexer(self.key, 0)
        picked = PickedIndices(indices) if self.picks else indices
        hidden = picked.new_ones((1, 1, keys.shape[2]), dtype=torch.bool).scatter(-1, picked.long(), False)
        mask = self._causal(keys.shape[2]) & ~hidden.unsqueeze(1)
        return self.attention(self.module, query, keys, values, mask, scaling=self.module.scaling)[0]

    def layer(self, hidden: torch.Tensor, position: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The whole module on a token's state ``[1, 1, hidden]``."""
        mask = self._causal(self.cache.get_seq_length() + 1)
        return self.module(hidden, position, mask, cache=self.cache)[0]


def _expected(module: Any, query: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Attention of a query to all of the given tokens in float64, every one of them expanded."""
    by_head = module.kv_b_proj.weight.view(module.num_heads, -1, module.kv_lora_rank).double()
    width, c, k = module.qk_nope_head_dim, latents[0, 0].double(), rotary[0, 0].double()
    out = []
    for q, up in zip(query[0, :, 0].double(), by_head, strict=True):
        scores = (c @ (up[:width].T @ q[:width]) + k @ q[width:]) * module.scaling
        out.append(up[width:] @ (scores.softmax(0) @ c))
    return torch.stack(out)[None, None]


@torch.inference_mode()
def measure(dtype: str, tokens: int, picked: int, args: argparse.Namespace, clock: Clock) -> list[Row]:
    """The rows of all codecs for one dtype and number of tokens."""
    torch.manual_seed(tokens)
    weights = DeepseekV32Attention(make_config(picked, args.picked_heads), 0).to(DTYPES[dtype]).eval()
    for weight in weights.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    like, held = weights.o_proj.weight, tokens + _OFFSET
    rank, turned = weights.kv_lora_rank, weights.qk_rope_head_dim
    latents, rotary = (torch.randn(1, 1, held, width).to(like) for width in (rank, turned))
    keys = torch.randn(1, held, weights.indexer.head_dim).to(like)
    codecs = {"ours none": None, "ours 8-bit": 8, "ours 4-bit": 4}
    methods = {
        (name, picks): IndexedMethod(weights, bits, picks, (latents, rotary, keys))
        for name, bits in codecs.items()
        for picks in (True, False)
    }
    query = torch.randn(1, args.picked_heads, 1, weights.qk_head_dim).to(like)
    new = [torch.randn(1, 1, 1, width).to(like) for width in (rank, turned)]
    chosen = torch.cat([torch.randperm(held)[: picked - 1], torch.tensor([held])]).to(torch.int32)[None, None]
    at = chosen[0, 0].long()
    truth = _expected(weights, query, *(torch.cat(x, 2)[:, :, at] for x in zip((latents, rotary), new, strict=True)))
    rows: dict[str, Row] = {}
    for (name, picks), method in methods.items():
        allowed = max(_TOLERANCES.get(codecs[name] or 0, 0.0), exact.TOLERANCES[dtype])
        error = exact.check(name, exact.relative_error(method.step(query, new[0], new[1], chosen), truth), allowed)
        if picks:
            shape = f"{args.picked_heads}/{rank} + {turned}, {dtype}"
            rows[name] = {"shape": shape, "dtype": dtype, "tokens": tokens, "cache": name, "picked": picked}
            rows[name] |= {"error": error, "bytes_held": held_bytes(method.cache)}
    hidden = torch.randn(1, 1, _HIDDEN).to(like)
    position = torch.ones(1, 1, turned).to(like), torch.zeros(1, 1, turned).to(like)  # not rotated

    def one_round(number: int) -> dict[str, float]:
        times = {f"step {at}": clock(partial(m.step, query, new[0], new[1], chosen)) for at, m in methods.items()}
        return times | {f"layer {at}": clock(partial(m.layer, hidden, position)) for at, m in methods.items()}

    for number in range(_WARM_UP):
        one_round(number)
    times = take_turns(one_round, args.rounds, min(args.rounds, _LEAST_ROUNDS), args.seconds)
    for name, row in rows.items():
        row["rounds"] = len(times[f"step {(name, True)}"])
        for kind in ("step", "layer"):
            row[f"picked_{kind}_us"] = median(times[f"{kind} {(name, True)}"])
            row[f"all_{kind}_us"] = median(times[f"{kind} {(name, False)}"])
            row[f"picked_{kind}_speedup"] = row[f"all_{kind}_us"] / row[f"picked_{kind}_us"]
    return list(rows.values())
