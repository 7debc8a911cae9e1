"""Step e: decoding steps of a model of 8 layers in Llama-3-8B's shape (random weights, bfloat16), and a prefill."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.measuring import add_kernels, attempt, kernels_of, wall_ms
from benchmarks.gpu.results import Results
from benchmarks.gpu.settings import Settings
from hf_kvcache import KVCache, unbind
from hf_kvcache.integration.versions import with_cache

METHODS = {"DynamicCache": None, "ours 4 bits": "unbiased4", "ours none": "none", "ours 8 bits": "rotated8"}
METHODS |= {"ours 2 bits": "unbiased2"}
DYNAMIC = "DynamicCache"


class Model:
    """The model and what is measured of it."""

    def __init__(self, settings: Settings, results: Results) -> None:
        self.settings, self.results = settings, results
        self.count = 3 if settings.tiny else 16
        wide: dict[str, Any] = {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 8,
            "head_dim": 128,
        }
        tiny: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        heads = (4, 2) if settings.tiny else (32, 8)
        config = LlamaConfig(
            vocab_size=8192,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            max_position_embeddings=262144,
            tie_word_embeddings=True,
            **(tiny if settings.tiny else wide),
        )
        config._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(settings.dtype)
        try:
            with settings.device:
                self.model = LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        self.config = self.model.config

    def cache(self, codec: str | None) -> Any:
        """An empty cache, and the model as it wants it."""
        unbind(self.config)
        return DynamicCache(config=self.config) if codec is None else KVCache(self.config, codec)

    def random_tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random keys and values of a layer."""
        size = (1, self.config.num_key_value_heads, count, self.config.head_dim)
        keys, values = (torch.randn(size, dtype=self.settings.dtype, device=self.settings.device) for _ in range(2))
        return keys, values

    def fill(self, cache: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the same keys and values in every layer, as after a prefill."""
        function = ALL_ATTENTION_FUNCTIONS["hf_kvcache"]
        query = keys.new_zeros(1, self.config.num_attention_heads, 1, keys.shape[3])
        for index, layer in enumerate(self.model.model.layers):
            held = cache.update(keys, values, index)
            if isinstance(cache, KVCache):
                function(layer.self_attn, query, *held, None, dropout=0.0, scaling=layer.self_attn.scaling)

    def steps(self, cache: Any, token: torch.Tensor, count: int) -> torch.Tensor:
        """The token behind ``count`` greedy steps."""
        for _ in range(count):
            out = self.model(token, **with_cache(self.model, cache), logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return token

    def first_token(self) -> torch.Tensor:
        return torch.ones(1, 1, dtype=torch.long, device=self.settings.device)

    def decode(self, tokens: int) -> None:
        """Milliseconds a token with every cache."""
        torch.manual_seed(tokens)
        keys, values = self.random_tokens(tokens + 40)
        dynamic: list[float] = []
        for name, codec in METHODS.items():
            case = f"T={tokens} {name}"
            if self.settings.left() < 12:
                self.results.leave_out(case)
                continue
            run = partial(self.decode_with, case, codec, keys, values, dynamic)
            attempt(self.settings, self.results, case, run)

    def decode_with(
        self, case: str, codec: str | None, keys: torch.Tensor, values: torch.Tensor, dynamic: list[float]
    ) -> None:
        """The same with one cache; ``dynamic`` keeps DynamicCache's time."""
        before = 0
        if self.settings.cuda:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
        cache = self.cache(codec)
        fill_ms = wall_ms(self.settings, lambda: self.fill(cache, keys, values))
        held = torch.cuda.memory_allocated() - before if self.settings.cuda else None
        token = self.steps(cache, self.first_token(), 3)
        self.settings.synchronize()
        begin = time.perf_counter()
        token = self.steps(cache, token, self.count)
        cpu_ms = (time.perf_counter() - begin) / self.count * 1e3
        self.settings.synchronize()
        ms = (time.perf_counter() - begin) / self.count * 1e3
        if codec is None:
            dynamic.append(ms)
        kernels = kernels_of(self.settings, lambda: self.steps(cache, token, 1), 2)
        self.results.add(
            case,
            ms_a_token=ms,
            cpu_ms=cpu_ms,
            gpu_busy_ms=sum(kernel.us for kernel in kernels) / 1e3,
            kernels_a_step=sum(kernel.number for kernel in kernels),
            times_dynamic=dynamic[0] / ms if dynamic else None,
            fill_ms=fill_ms,
            bytes_more=held,
        )
        add_kernels(self.results, case, kernels)

    def prefill(self, tokens: int) -> None:
        """The first forward pass, after which everything is packed."""
        ids = torch.randint(0, 8000, (1, tokens), device=self.settings.device)

        def run(case: str, codec: str | None) -> None:
            times = [wall_ms(self.settings, partial(self.prefill_once, ids, self.cache(codec))) for _ in range(3)]
            self.results.add(case, ms=min(times))

        for name, codec in {**METHODS, "ours kvarn, 4 bits": "kvarn4"}.items():
            case = f"prefill of {tokens} {name}"
            if self.settings.left() < 6:
                self.results.leave_out(case)
            else:
                attempt(self.settings, self.results, case, partial(run, case, codec))

    def prefill_once(self, ids: torch.Tensor, cache: Any) -> None:
        self.model(ids, **with_cache(self.model, cache), logits_to_keep=1)
        if isinstance(cache, KVCache):
            for layer in cache.own_layers:
                layer.flush()

    def python_profile(self) -> None:
        """The Python functions that a step spends its time in."""
        cache = self.cache("unbiased4")
        self.fill(cache, *self.random_tokens(1024 + 40))
        token = self.steps(cache, self.first_token(), 4)
        profiler = cProfile.Profile()
        profiler.enable()
        self.steps(cache, token, 20)
        profiler.disable()
        self.settings.synchronize()
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(25)
        print(text.getvalue()[-3500:], flush=True)


def run(settings: Settings, results: Results) -> None:
    with torch.inference_mode():
        model = Model(settings, results)
        contexts = [256] if settings.tiny else [32768, 131072]
        model.decode(contexts[0])
        model.prefill(128 if settings.tiny else 8192)
        for tokens in contexts[1:]:
            model.decode(tokens)
        attempt(settings, results, "Python profile", model.python_profile)
