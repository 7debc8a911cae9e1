"""Beside step b: small random models through ``generate()`` with every kind of cache, and where a plain step waits.

``tests/gpu`` runs the same checks.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, LlamaConfig, MistralConfig

from benchmarks.gpu.measuring import attempt
from benchmarks.gpu.results import FAILED, LEFT_OUT, Figures, Results
from benchmarks.gpu.settings import Settings
from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache, SlidingWindowCache, unbind
from hf_kvcache.integration.versions import CACHE_ARGUMENT, with_cache
from hf_kvcache.kernels.reference.hadamard import rotation_signs

Inputs = dict[str, torch.Tensor]
Make = Callable[[Any], Any]
VOCABULARY, RIGHT = 997, "right"
DTYPES = {"": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: How far logits may lie from those with a full cache, relative to them, up to the first token that differs: rounding
#: of 32 and 16 bits, and what these codecs cost these models, about twice what was seen on a CPU.
EXACT, HALF = 1e-3, 5e-2
CODED = {8: 0.13, 4: 0.5, 3: 0.6, 2: 1.0}


class Check(NamedTuple):
    """What is to be run.

    Attributes:
        allowed: of the figure ``logits_error``.
        same: whether the tokens have to be the same, but for ties.
    """

    name: str
    run: Callable[[], Figures]
    allowed: float = torch.inf
    same: bool = False

    def problems(self, found: Figures) -> list[str]:
        """What is wrong with the figures that :attr:`run` returned."""
        wrong = []
        if not found.get("finite", True):
            wrong.append("a logit is not finite")
        if not found.get("logits_error", 0.0) <= self.allowed:
            wrong.append(f"logits are off by {found['logits_error']:.2e}, {self.allowed:g} is allowed")
        tie = found.get("margin", 0.0) <= 1e-3
        if self.same and not (found["same_tokens"] or tie):
            wrong.append(f"{found['tokens_alike']} of {found['tokens']} tokens are the same")
        if not found.get("saved_alike", True):
            wrong.append("a loaded cache goes on differently")
        if found.get("absorbed_steps", 1) == 0:
            wrong.append("no step was computed on latents")
        return wrong


class Models:
    """Small random models and what they generate with a full cache, each made when it is first asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.new, self.prompt_length = (24, 40) if settings.tiny else (150, 333)
        # Small, so that pages are packed while tokens are generated.
        size = 16 if settings.tiny else 32
        self.small: dict[str, Any] = {"page_size": size, "tail_length": size}
        self._models: dict[str, Any] = {}
        self._full: dict[str, Any] = {}

    def model(self, kind: str) -> Any:
        """The model ``kind``: a family, and a dtype behind it."""
        if kind not in self._models:
            family, _, dtype = kind.partition(" ")
            config = {"llama": self._llama, "mistral": self._mistral, "deepseek": self._deepseek}[family]()
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).to(self.settings.device)
            self._models[kind] = randomized(model)
        return self._models[kind]

    def full(self, kind: str, batch: int, **options: Any) -> Any:
        """What it generates with a ``DynamicCache``."""
        key = f"{kind} {batch} {options}"
        if key not in self._full:
            model = self.model(kind)
            unbind(model.config)
            cache = DynamicCache(config=model.config)
            self._full[key] = self.generate(model, cache, self.prompt(batch), **options)
        return self._full[key]

    def prompt(self, batch: int = 1) -> Inputs:
        """Random tokens, in a batch with padding on the left."""
        size, draw = (batch, self.prompt_length), torch.Generator().manual_seed(0)
        # Named, since there may be another default device.
        ids = torch.randint(1, VOCABULARY, size, generator=draw, device="cpu").to(self.settings.device)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, : row * self.prompt_length // (batch + 1)] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}

    def generate(self, model: Any, cache: Any, inputs: Inputs, **options: Any) -> Any:
        """Tokens and logits, greedily."""
        options = {"max_new_tokens": self.new, "do_sample": False, CACHE_ARGUMENT: cache} | options
        return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)

    def _llama(self) -> LlamaConfig:
        wide: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
        tiny: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        heads = 4 if self.settings.tiny else 8
        sizes = tiny if self.settings.tiny else wide
        return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=2, **self._shared())

    def _mistral(self) -> MistralConfig:
        head, window = (16, 24) if self.settings.tiny else (64, 100)
        return MistralConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=head,
            sliding_window=window,
            **self._shared(),
        )

    def _deepseek(self) -> DeepseekV3Config:
        rank, rotary = (64, 16) if self.settings.tiny else (256, 64)
        return DeepseekV3Config(
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            q_lora_rank=64,
            kv_lora_rank=rank,
            qk_rope_head_dim=rotary,
            qk_nope_head_dim=32,
            v_head_dim=32,
            first_k_dense_replace=2,
            **self._shared(),
        )

    def _shared(self) -> dict[str, Any]:
        return {"vocab_size": VOCABULARY, "max_position_embeddings": 4096, "tie_word_embeddings": False}


def randomized(model: Any) -> Any:
    """The model with weights that make logits differ clearly from token to token: the usual ones hardly do."""
    torch.manual_seed(1)
    for path, weight in model.named_parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=1.0 if "embed_tokens" in path else 1.5 * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def compared(ours: Any, full: Any, prompt_length: int) -> Figures:
    """Tokens alike, and how far logits lie apart up to the first token that differs in some row."""
    a, b = ours.sequences[:, prompt_length:], full.sequences[:, prompt_length:]
    alike = (a == b).all(0)
    first = a.shape[1] if bool(alike.all()) else int(alike.int().argmin())
    found: Figures = {"tokens_alike": first, "tokens": a.shape[1], "same_tokens": first == a.shape[1]}
    if ours.logits and full.logits and len(ours.logits) == len(full.logits):
        steps = min(first + 1, a.shape[1])
        x, y = torch.stack(ours.logits[:steps]).double(), torch.stack(full.logits[:steps]).double()
        best = y.topk(2, -1).values
        found |= {
            "logits_error": ((x - y).norm() / y.norm()).item(),
            "finite": bool(torch.stack(ours.logits).isfinite().all()),
            "margin": (best[..., 0] - best[..., 1]).min().item(),
        }
    return found


def ours(m: Models, kind: str, make: Make, batch: int = 1, **options: Any) -> Figures:
    """Generation with one of our caches against a full one."""
    wanted, model = m.full(kind, batch, **options), m.model(kind)
    cache = make(model.config)
    begin = time.perf_counter()
    out = m.generate(model, cache, m.prompt(batch), **options)
    m.settings.synchronize()
    found = compared(out, wanted, m.prompt_length) | {"seconds": time.perf_counter() - begin}
    if "num_beams" not in options:  # beams end in another order than they were begun
        cache.integrity()
    if isinstance(cache, LatentKVCache):
        found["absorbed_steps"] = cache.absorbed_steps
    unbind(model.config)
    return found


def looked_up(m: Models, kind: str, make: Make) -> Figures:
    """Prompt lookup against plain decoding with the same kind of cache."""
    model, inputs = m.model(kind), m.prompt()
    ids = inputs["input_ids"]
    inputs["input_ids"] = ids[:, : m.prompt_length // 4 + 1].repeat(1, 4)[:, : m.prompt_length]
    plain = m.generate(model, make(model.config), inputs)
    cache = make(model.config)
    drafted = m.generate(model, cache, inputs, prompt_lookup_num_tokens=5)
    cache.integrity()
    unbind(model.config)
    return compared(drafted, plain, m.prompt_length)


def forked(m: Models, kind: str, make: Make) -> Figures:
    """A copy of a prompt's cache, and one loaded from its saved state, go on as the cache itself does."""
    model, inputs = m.model(kind), m.prompt()
    cache = make(model.config)
    with torch.inference_mode():
        model(inputs["input_ids"][:, :-1], **with_cache(model, cache))
    other, saved = copy.deepcopy(cache), make(model.config)
    saved.load_state_dict({name: x.clone() for name, x in cache.state_dict().items()})
    own, copied, loaded = (m.generate(model, each, inputs) for each in (cache, other, saved))
    unbind(model.config)
    return compared(copied, own, m.prompt_length) | {"saved_alike": torch.equal(loaded.sequences, own.sequences)}


def evicted(m: Models, kind: str, make: Make) -> Figures:
    """Generation with a cache that drops tokens: nothing breaks."""
    model = m.model(kind)
    cache = make(model.config)
    out = m.generate(model, cache, m.prompt())
    cache.integrity()
    unbind(model.config)
    return {"finite": bool(torch.stack(out.logits).isfinite().all()), "bytes_held": cache.memory().total}


@torch.inference_mode()
def waits(m: Models, kind: str, make: Make, batch: int, steps: int = 3) -> Figures:
    """Where a plain decoding step waits for the GPU, as torch warns of it, and how often a step does."""
    model, inputs = m.model(kind), m.prompt(batch)
    cache, found = make(model.config), Counter[str]()
    mask = inputs["attention_mask"]
    token = model(**inputs, **with_cache(model, cache), logits_to_keep=1).logits[:, -1:].argmax(-1)
    for number in range(steps + 1):
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if m.settings.cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")
            try:
                out = model(token, attention_mask=mask, **with_cache(model, cache))
                token = out.logits[:, -1:].argmax(-1)
            finally:
                if m.settings.cuda:
                    torch.cuda.set_sync_debug_mode("default")
        if number:  # the first step may compile
            found.update(place(w) for w in seen if "synchroniz" in str(w.message))
    unbind(model.config)
    return {"waits_a_step": sum(found.values()) / steps} | {f"at {at}": n / steps for at, n in found.most_common(8)}


def place(warning: warnings.WarningMessage) -> str:
    """The file and line that a warning names, without the folder that packages are installed in."""
    name = warning.filename.split("site-packages/")[-1]
    return f"{name[name.rfind('hf_kvcache/') :] if 'hf_kvcache/' in name else name}:{warning.lineno}"


def default_device(m: Models, make: Make) -> Figures:
    """Generation in a program that has set a default device."""
    torch.set_default_device(m.settings.device)
    try:
        rotation_signs.cache_clear()  # made on the CPU whatever the default
        return ours(m, "llama", make)
    finally:
        torch.set_default_device(None)


def checks(settings: Settings) -> list[Check]:
    """All checks, the most important first."""
    m = Models(settings)
    found = [*kept_whole(m), *coded(m), *latents(m), *operations(m), *evicting(m), *waiting(m)]
    found.append(Check("default device, 4 bits", partial(default_device, m, quantized(m, 4)), CODED[4]))
    return [check for check in found if settings.only in check.name]


def quantized(m: Models, bits: int) -> Make:
    return lambda config: QuantizedKVCache(config, bits=bits, **m.small)


def dense(m: Models) -> Make:
    return lambda config: KVCache(config, **m.small, codec="none")


def latent(m: Models, bits: int | None = None) -> Make:
    return lambda config: LatentKVCache(config, bits=bits, **m.small)


def kept_whole(m: Models) -> list[Check]:
    """Caches that hold all as it is."""
    make, chunk = dense(m), {"prefill_chunk_size": m.prompt_length // 4}
    return [
        Check("llama fp32, none", partial(ours, m, "llama", make), EXACT, True),
        Check("llama bf16, none", partial(ours, m, "llama bf16", make), HALF),
        Check("llama fp32, none, padded batch", partial(ours, m, "llama", make, 3), EXACT, True),
        Check("mistral fp32, none, windows", partial(ours, m, "mistral", make), EXACT, True),
        Check("llama fp32, none, prefill in chunks", partial(ours, m, "llama", make, **chunk), EXACT, True),
        Check("llama fp32, none, beams", partial(ours, m, "llama", make, num_beams=3), same=True),
    ]


def coded(m: Models) -> list[Check]:
    """Caches that pack keys and values."""
    found = []
    for dtype, bits in (("", 4), ("bf16", 4), ("fp16", 4), ("bf16", 8), ("bf16", 2)):
        run = partial(ours, m, f"llama {dtype}".strip(), quantized(m, bits))
        found.append(Check(f"llama {dtype or 'fp32'}, {bits} bits", run, CODED[bits]))
    for codec, bits in (("kvarn3", 3), ("fp8", 8)):
        make = partial(KVCache, codec=codec, **m.small)
        found.append(Check(f"llama fp32, {codec}", partial(ours, m, "llama", make), CODED[bits]))
    four, chunk = quantized(m, 4), {"prefill_chunk_size": m.prompt_length // 4}
    return [
        *found,
        Check("llama bf16, 4 bits, padded batch", partial(ours, m, "llama bf16", four, 3), CODED[4]),
        Check("mistral bf16, 4 bits, windows", partial(ours, m, "mistral bf16", four), CODED[4]),
        Check("llama bf16, 4 bits, prefill in chunks", partial(ours, m, "llama bf16", four, **chunk), CODED[4]),
    ]


def latents(m: Models) -> list[Check]:
    """Caches of a model's own latents."""
    half = "deepseek bf16"
    return [
        Check("deepseek fp32, latents", partial(ours, m, "deepseek", latent(m)), EXACT, True),
        Check("deepseek fp32, latents, padded batch", partial(ours, m, "deepseek", latent(m), 3), EXACT, True),
        Check("deepseek bf16, latents", partial(ours, m, half, latent(m)), HALF),
        Check("deepseek bf16, latents, 8 bits", partial(ours, m, half, latent(m, 8)), CODED[8]),
        Check("deepseek bf16, latents, 4 bits", partial(ours, m, half, latent(m, 4)), CODED[4]),
    ]


def operations(m: Models) -> list[Check]:
    """Rolling back, copies, saved states."""
    return [
        Check("llama fp32, none, prompt lookup", partial(looked_up, m, "llama", dense(m)), EXACT, True),
        Check("llama fp32, 4 bits, prompt lookup", partial(looked_up, m, "llama", quantized(m, 4)), CODED[4]),
        Check("deepseek fp32, latents, prompt lookup", partial(looked_up, m, "deepseek", latent(m)), EXACT, True),
        Check("llama fp32, 4 bits, copied and saved", partial(forked, m, "llama", quantized(m, 4)), EXACT, True),
    ]


def evicting(m: Models) -> list[Check]:
    """Caches that drop tokens."""

    def budgeted(policy: str, **options: Any) -> Make:
        return lambda config: HeavyHitterCache(config, budget=96, policy=policy, **m.small, **options)

    def window(config: Any) -> Any:
        return SlidingWindowCache(config, window=96, sinks=4, reindex=True)

    return [
        Check("llama fp32, snapkv, 4 bits", partial(evicted, m, "llama", budgeted("snapkv", bits=4))),
        Check("llama bf16, h2o", partial(evicted, m, "llama bf16", budgeted("h2o"))),
        Check("llama fp32, window", partial(evicted, m, "llama", window)),
    ]


def waiting(m: Models) -> list[Check]:
    """Where plain steps wait."""
    return [
        Check("waits: llama bf16, 4 bits", partial(waits, m, "llama bf16", quantized(m, 4), 1)),
        Check("waits: llama bf16, DynamicCache", partial(waits, m, "llama bf16", lambda c: DynamicCache(config=c), 1)),
        Check("waits: llama bf16, 4 bits, padded batch", partial(waits, m, "llama bf16", quantized(m, 4), 3)),
        Check("waits: mistral bf16, 4 bits", partial(waits, m, "mistral bf16", quantized(m, 4), 1)),
        Check("waits: deepseek bf16, latents, 4 bits", partial(waits, m, "deepseek bf16", latent(m, 4), 1)),
    ]


def run(settings: Settings, results: Results) -> None:
    if settings.cuda:
        torch.backends.cuda.matmul.allow_tf32 = False
    for check in checks(settings):
        if settings.left() < 4:
            results.leave_out(check.name)
            continue
        attempt(settings, results, check.name, lambda check=check: judge(check, results))  # type: ignore[misc]


def judge(check: Check, results: Results) -> None:
    """Run a check and take note of what it gave."""
    found = check.run()
    wrong = check.problems(found)
    shown = "right" if not wrong else f"WRONG: {'; '.join(wrong)}"
    results.add(check.name, f"{check.name}: {shown}", **found, **{RIGHT: not wrong})


def lines(found: dict[str, Figures]) -> list[str]:
    """The results of this step in words."""
    right = sum(bool(figures.get(RIGHT)) for figures in found.values())
    text = [f"generation: {right} of {len(found)} checks right"]
    for name, figures in found.items():
        if "waits a step" in figures:
            places = ", ".join(f"{k[3:]} {v:g}" for k, v in figures.items() if k.startswith("at "))
            text.append(f"  {name}: {figures['waits a step']:g} a step {places}"[:240])
        elif not figures.get(RIGHT):
            why = figures.get(FAILED) or figures.get(LEFT_OUT) or figures
            text.append(f"  WRONG {name}: {str(why)[:240]}")
    return text
