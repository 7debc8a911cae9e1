"""A model that two processes share by tensor parallelism: each holds its own KV heads, and both give what one gives."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache
from hf_kvcache.lowrank import calibrate
from hf_kvcache.prompts import PromptStore
from tests import families
from tests.generation.kinds import KINDS
from tests.lowrank.test_calibration import TEXTS, Letters
from tests.mla import families as mla_families
from tests.running import as_cache, forward, left_padded, prompt, small_cache

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
#: Sums over the heads of a process, then over processes, are rounded otherwise than one sum. Logits are about 2. Where
#: a value lies between two codes, it may get the other one.
ROUNDED, RECODED = 2e-5, 2e-3


def _evicting(policy: str, model: PreTrainedModel) -> KVCache:
    return HeavyHitterCache(model.config, 28, policy, sink_length=2, tail_length=4, page_size=8, interval=8)


#: Caches by name, each with the family of its model, and how far its logits may be off.
CASES: dict[str, tuple[str, Callable[[PreTrainedModel], KVCache], float]] = {
    "full": ("llama", small_cache, ROUNDED),
    "rotated4": ("llama", partial(small_cache, codec="rotated4"), RECODED),
    "turboquant4": ("qwen3", partial(small_cache, codec="turboquant4"), RECODED),
    "window": ("gemma3", partial(small_cache, codec="unbiased4"), RECODED),
    # Its plan splits the embeddings only: every process has all heads.
    "sink logits": ("gpt_oss", partial(small_cache, codec="rotated4"), RECODED),
    "snapkv": ("llama", KINDS["snapkv"].cache, ROUNDED),
    "h2o": ("qwen3", KINDS["h2o"].cache, ROUNDED),
    "critical": ("llama", partial(_evicting, "critical-snapkv"), ROUNDED),
    "reindexed": ("llama", KINDS["reindexed"].cache, ROUNDED),
    "recurrent": ("qwen3_next", KINDS["recurrent"].cache, RECODED),
    # All heads share the latents, so every process has them all.
    "latents": ("deepseek_v3", KINDS["latents"].cache, ROUNDED),
    "evicted latents": ("deepseek_v3", KINDS["evicted latents"].cache, ROUNDED),
}
WHOLE = ("sink logits", "latents", "evicted latents")


def results(model: PreTrainedModel, case: str) -> dict[str, torch.Tensor]:
    """Generated tokens of a padded batch, logits of a prompt, a chunk and steps."""
    padded = left_padded([prompt(61), prompt(40)])
    tokens = model.generate(**padded, **as_cache(CASES[case][1](model)), **GREEDY)
    cache = CASES[case][1](model)
    parts = [prompt(60), *prompt(30, seed=3).split([7, *[1] * 23], 1)]
    return {"tokens": tokens, "logits": torch.cat([forward(model, part, cache) for part in parts], 1)}


def check_in_process(rank: int, folder: Path, port: int) -> None:
    """What each of two processes does: raises where something differs from what one process gave."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    distributed.init_process_group("gloo")
    try:
        for case, (_, make, allowed) in CASES.items():
            model = AutoModelForCausalLM.from_pretrained(folder / case, tp_plan="auto").eval()
            cache = make(model)
            forward(model, prompt(60), cache)
            heads = model.config.num_key_value_heads
            held = {layer.storage.dense.keys.shape[1] for layer in cache.own_layers}
            assert held == {1 if "latents" in case else heads if case in WHOLE else heads // 2}, (case, held)
            found, expected = results(model, case), torch.load(folder / case / "expected")
            assert torch.equal(found["tokens"], expected["tokens"]), case
            assert float((found["logits"] - expected["logits"]).abs().max()) < allowed, case
        check_refusals(AutoModelForCausalLM.from_pretrained(folder / "full", tp_plan="auto").eval())
    finally:
        distributed.destroy_process_group()


def check_refusals(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="a PromptStore with a LlamaForCausalLM that 2 processes share"):
        PromptStore(lambda: small_cache(model), model=model)
    with pytest.raises(ValueError, match="that 2 processes share"):
        PromptStore(lambda: small_cache(model)).generate(model, prompt(20))
    with pytest.raises(ValueError, match="recording attention with a LlamaForCausalLM that 2 processes share"):
        calibrate(model, TEXTS, Letters(), "svd", tokens=40, progress=False)
    with pytest.raises(ValueError, match="got 1 KV heads"):
        forward(model, prompt(60), KINDS["low rank"].cache(model))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    for case, (family, _, _) in CASES.items():
        module = families if family in families.every_name() else mla_families
        model = module.build(family)
        model.save_pretrained(tmp_path / case)
        torch.save(results(model, case), tmp_path / case / "expected")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(check_in_process, (tmp_path, port), nprocs=2)
