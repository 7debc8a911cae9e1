"""What else is measured of one layer: latents, packing, launch configurations, chunks, page events, graphs, peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.measuring import add_kernels, attempt, kernels_of, relative, sorted_times, time_steps, wall_ms
from benchmarks.gpu.methods import Dynamic, InPlace, Ours, OursStatic, Static, latent_module
from benchmarks.gpu.results import reason
from hf_kvcache import LatentKVCache
from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.latent import latent_codec
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.latent_decode import absorb, expand, latent_attend
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage import PagedStorage

if TYPE_CHECKING:
    from benchmarks.gpu.layer import Layer

Part = Callable[[], None]
LATENTS = {"none": None, "8 bits": 8, "4 bits": 4}
#: Replays of a graph between two clocks, how often, and the most steps that this makes with those before the capture.
_REPLAYS, _ROUNDS, _REPLAYED = 20, 5, 128
#: Changes of a launch: its name, factor of the programs, warps, stages.
LAUNCHES = (
    ("as it is", 1.0, None, None),
    ("half the programs", 0.5, None, None),
    ("2 x programs", 2.0, None, None),
    ("4 x programs", 4.0, None, None),
    ("8 x programs", 8.0, None, None),
    ("2 x programs, 2 warps", 2.0, 2, None),
    ("2 x programs, 8 warps", 2.0, 8, None),
    ("2 x programs, 4 stages", 2.0, None, 4),
)


def first(layer: Layer) -> list[Part]:
    tiny = layer.settings.tiny
    return [
        partial(latents, layer, *((256, 4, 2) if tiny else (65536, 128, 1))),
        partial(mla_steps, layer, *((256, 4) if tiny else (16384, 128))),
        partial(packing, layer, 512 if tiny else 8192),
        partial(launches, layer, 256 if tiny else 131072),
    ]


def then(layer: Layer) -> list[Part]:
    tiny = layer.settings.tiny
    return [
        *(partial(chunk, layer, *((256, 40) if tiny else (16384, length))) for length in (512, 64)),
        partial(page_event, layer),
        partial(latents, layer, *((256, 2, 2) if tiny else (65536, 16, 8))),
    ]


def at_last(layer: Layer) -> list[Part]:
    """What might harm the process if it fails (a capture), or take long."""
    tokens = 256 if layer.settings.tiny else 16384
    return [partial(graphs, layer, tokens), partial(peers, layer, tokens)]


def timed(layer: Layer, case: str, step: Callable[[int], Any], held: int | None, error: float | None = None) -> None:
    """Time a step that reads ``held`` bytes."""
    for number in range(3):
        step(number)
    found = time_steps(layer.settings, step, layer.steps)
    rate = None if held is None else held / found.gpu / 1e3
    share = None if rate is None else rate / layer.copy_rate
    layer.results.add(case, **found.figures(), gb_per_s=rate, share_of_copy=share, error=error)


def latents(layer: Layer, tokens: int, heads: int, batch: int) -> None:
    """Absorbed latent attention (r = 512, dr = 64), the kernels alone, against two batched products in torch."""
    rank, rotary = (64, 16) if layer.settings.tiny else (512, 64)
    latent, turned = (layer.random(batch, 1, tokens + 172, n) for n in (rank, rotary))
    query, joined = layer.random(batch, heads, 1, rank + rotary), torch.cat([latent, turned], -1)[:, 0]
    scoring, plain = Scoring((rank + rotary) ** -0.5), query[:, :, 0]
    seen, case = Visibility(latent.shape[2], 1, None, 0, True, None), f"latents T={tokens} B={batch} H={heads}"

    def in_torch(number: int) -> torch.Tensor:
        weights = torch.bmm(plain, joined.transpose(1, 2)).mul_(scoring.scaling).softmax(-1)
        return torch.bmm(weights, joined[..., :rank])

    def ours(name: str, bits: int | None) -> None:
        encoder = PageEncoder(latent_codec(None, bits, None, [rank], {}), rank, rotary, 128, latent.dtype)
        storage = PagedStorage(encoder, latent, turned, 4, 128)
        storage.append_block(latent, turned, 0, None)
        used = storage.dense.longest
        dense = DenseTokens(storage.dense.keys[:, :, :used], storage.dense.values[:, :, :used])
        held = sum(storage_bytes(storage).values())

        def step(number: int) -> torch.Tensor:
            return latent_attend(query, storage.pages(), dense, seen, scoring).output[:, 0]

        timed(layer, f"{case} ours {name}", step, held, relative(step(0), in_torch(0)))
        add_kernels(layer.results, f"{case} ours {name}", kernels_of(layer.settings, lambda: step(0)), 4)

    parts: dict[str, Part] = {"torch, in place": partial(timed, layer, f"{case} torch", in_torch, joined.nbytes)}
    parts |= {f"ours {name}": partial(ours, name, bits) for name, bits in LATENTS.items()}
    weight, small = layer.random(heads, 128, rank), layer.random(batch, heads, 1, 128)
    wide = layer.random(batch, 1, heads, rank)
    absorbed, expanded = (lambda number: absorb(small, weight)), (lambda number: expand(wide, weight))
    parts |= {"absorb": partial(timed, layer, f"{case} absorb", absorbed, weight.nbytes)}
    parts |= {"expand": partial(timed, layer, f"{case} expand", expanded, weight.nbytes)}
    each(layer, case, parts)


def storage_bytes(storage: PagedStorage) -> dict[str, int]:
    """Bytes that a step reads of a storage, by part."""
    from hf_kvcache.storage.memory import bytes_by_part

    return {part: n for part, n in bytes_by_part(storage).items() if part in ("codes", "scales", "sinks", "tail")}


def each(layer: Layer, case: str, parts: dict[str, Part], least: float = 6) -> None:
    """Run parts one after the other while there is time."""
    for name, part in parts.items():
        if layer.settings.left() < least:
            layer.results.leave_out(f"{case} {name}")
        else:
            attempt(layer.settings, layer.results, f"{case} {name}", part)


def mla_steps(layer: Layer, tokens: int, heads: int) -> None:
    """A step of a layer with latent attention as transformers makes it: DynamicCache, which expands all, and ours."""
    rank, rotary, width = (64, 16, 32) if layer.settings.tiny else (512, 64, 128)
    latent, turned = layer.random(1, 1, tokens + 40, rank), layer.random(1, 1, tokens + 40, rotary)
    query = layer.random(1, heads, 1, width + rotary)
    new = layer.random(1, 1, 1, rank), layer.random(1, 1, 1, rotary)
    case, truth = f"MLA step T={tokens} H={heads}", None

    def run(name: str, make: Callable[[Any], Any]) -> None:
        nonlocal truth
        module, config = latent_module(heads, rank, rotary, width)
        module = module.to(layer.settings.device, layer.settings.dtype)
        cache = make(config)
        function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]

        def step(number: int) -> torch.Tensor:
            keys, values = module.expand_kv(*cache.update(*new, 0))
            return function(module, query, keys, values, None, scaling=module.scaling)[0]

        cache.update(latent, turned, 0)
        out = step(0)
        truth = out if truth is None else truth
        held = 2 * (tokens + 40) * (rank + rotary)
        timed(layer, f"{case} {name}", step, held, relative(out, truth))
        add_kernels(layer.results, f"{case} {name}", kernels_of(layer.settings, lambda: step(0)), 4)

    parts: dict[str, Part] = {"DynamicCache": partial(run, "DynamicCache", lambda config: DynamicCache())}
    for name, bits in LATENTS.items():
        parts[f"ours {name}"] = partial(run, f"ours {name}", partial(LatentKVCache, bits=bits))
    each(layer, case, parts)


def packing(layer: Layer, tokens: int) -> None:
    """Packing a prompt, the scale and the mean of its keys included."""
    query, keys, values = layer.new(1, layer.query_heads[0], tokens)

    def run(codec: str, case: str) -> None:
        encoder = PageEncoder(resolve(codec), layer.dim, layer.dim, 128, keys.dtype)

        def pack() -> None:
            storage = PagedStorage(encoder, keys, values, 4, 128)
            storage.writer.basis.balance(query, keys, None, storage.sink_length)
            storage.append_block(keys, values, 0, None)

        pack()
        ms = wall_ms(layer.settings, pack)
        count = sum(kernel.number for kernel in kernels_of(layer.settings, pack, 1))
        layer.results.add(f"packing {case}", ms=ms, kernels=count)

    parts: dict[str, Part] = {}
    for codec in ("unbiased4", "rotated8", "kvarn4", "none", "fp8"):
        case = f"T={tokens} {codec}"
        parts[case] = partial(run, codec, case)
    each(layer, "packing", parts, 5)


def launches(layer: Layer, tokens: int) -> None:
    """Does another number of programs, of warps or of stages read pages faster?"""
    if not layer.settings.kernels:
        return
    from hf_kvcache.kernels.triton import launch

    keys, values = layer.tokens(1, tokens + 40)
    new, wanted, config = layer.new(1, layer.query_heads[0]), launch.programs_wanted, launch.attention_config
    made: dict[str, Ours] = {}

    def run(codec: str, name: str, factor: float, warps: int | None, stages: int | None) -> None:
        if codec not in made:
            made.clear()
            made[codec] = Ours.filled(layer.settings, codec, keys, values)

        def changed(*given: Any) -> Any:
            usual = config(*given)
            return usual._replace(num_warps=warps or usual.num_warps, num_stages=stages or usual.num_stages)

        with (
            patch.object(launch, "programs_wanted", lambda device: max(1, int(factor * wanted(device)))),
            patch.object(launch, "attention_config", changed),
        ):
            timed(layer, f"launch T={tokens} {codec} {name}", lambda number: made[codec].step(*new), None)

    parts: dict[str, Part] = {}
    for codec in ("unbiased4", "none", "unbiased2", "rotated8", "rotated4"):
        for name, factor, warps, stages in LAUNCHES:
            if codec in ("unbiased4", "unbiased2") or not (warps or stages):
                parts[f"{codec} {name}"] = partial(run, codec, name, factor, warps, stages)
    each(layer, "launch", parts)


def chunk(layer: Layer, tokens: int, length: int) -> None:
    """New tokens over what is held (prefill in chunks, a long second turn): ``extend`` against SDPA.

    SDPA in place has keys and values of every query head in memory, the new ones behind them, and a mask that fast
    kernels know. Nothing is copied while it is timed. DynamicCache is given the mask that a model gives it.
    """
    from benchmarks.gpu.layer import CODECS

    keys, values = layer.tokens(1, tokens)
    new = layer.new(1, layer.query_heads[0], length)
    mask = torch.ones(length, tokens + length, dtype=torch.bool, device=layer.settings.device).tril(tokens)[None, None]

    def dynamic(case: str) -> None:
        made = [Dynamic(keys, values) for _ in range(3)]
        ms = [wall_ms(layer.settings, partial(method.step, *new, mask)) for method in made]
        layer.results.add(case, ms=min(ms))

    def in_place(case: str) -> None:
        group = layer.query_heads[0] // layer.heads
        held = [torch.cat([x, y], 2).repeat_interleave(group, 1) for x, y in zip((keys, values), new[1:], strict=True)]
        bias = causal_lower_right(length, tokens + length)
        attend = partial(scaled_dot_product_attention, new[0], *held, attn_mask=bias)
        layer.results.add(case, ms=min(wall_ms(layer.settings, attend) for _ in range(4)))

    def ours(case: str, codec: str) -> None:
        method, ms = Ours.filled(layer.settings, codec, keys, values), []
        held = method.cache
        for _ in range(4):
            method.cache = held.fork()
            ms.append(wall_ms(layer.settings, partial(method.step, *new)))
        layer.results.add(case, ms=min(ms))

    case = f"chunk of {length} over T={tokens}"
    parts: dict[str, Part] = {"DynamicCache": partial(dynamic, f"{case} DynamicCache")}
    parts |= {"sdpa in place": partial(in_place, f"{case} sdpa in place")}
    parts |= {f"ours {name}": partial(ours, f"{case} ours {name}", codec) for name, codec in CODECS.items()}
    each(layer, case, parts)


def page_event(layer: Layer) -> None:
    """The step in which a page is packed, against ordinary ones."""
    new = layer.new(1, layer.query_heads[0])

    def run(codec: str) -> None:
        method = Ours.filled(layer.settings, codec, *layer.tokens(1, 1024 + 4 + Ours.RECENT))
        times = [wall_ms(layer.settings, partial(method.step, *new)) * 1e3 for _ in range(140)][2:]
        layer.results.add(f"page event {codec}", ordinary_us=sorted(times)[len(times) // 2], slowest_us=max(times))

    each(layer, "page event", {codec: partial(run, codec) for codec in ("unbiased4", "kvarn4", "none")})


def graphs(layer: Layer, tokens: int) -> None:
    """The same step again and again from a CUDA graph, the dense sides first; why not, where it cannot be captured.

    Nothing grows: SDPA in place overwrites its last token, DynamicCache appends to the same tokens each time, and
    StaticCache goes on into the room that it has and reads in any case. With ``max_length`` our step goes on too, and
    packs a page where one is due.
    """
    if not layer.settings.cuda:
        return
    from benchmarks.gpu.layer import CODECS

    keys, values = layer.tokens(1, tokens + 40)
    new = layer.new(1, layer.query_heads[0])
    makes: dict[str, Callable[[], Any]] = {
        "sdpa in place, gqa": lambda: InPlace(keys, values, 0, False, growing=False),
        "sdpa in place, grouped": lambda: InPlace(keys, values, 0, True, growing=False),
        "DynamicCache": lambda: Dynamic(keys, values),
        "StaticCache": lambda: Static(keys, values, _REPLAYED),
    }
    makes |= {f"ours {n}": partial(Ours.filled, layer.settings, codec, keys, values) for n, codec in CODECS.items()}
    makes |= {f"ours {n}, max_length": partial(OursStatic, c, keys, values, _REPLAYED) for n, c in CODECS.items()}
    for name, make in makes.items():
        case = f"graph T={tokens} {name}"
        if layer.settings.left() < 6:
            layer.results.leave_out(case)
            continue
        try:
            method = make()
            us = replayed(lambda: method.step(*new))  # noqa: B023
            layer.results.add(case, gpu_us=us, gb_per_s=method.bytes_read() / us / 1e3)
        except Exception as error:  # a step that waits or uploads cannot be captured
            layer.results.leave_out(case, f"not captured: {reason(error, 160)}")


def replayed(step: Callable[[], Any]) -> float:
    """Microseconds of a step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        for _ in range(_REPLAYS):
            graph.replay()

    return sorted_times(replay, _ROUNDS)[2] / _REPLAYS


def peers(layer: Layer, tokens: int) -> None:
    """Other caches of transformers, one sequence; with a note where one cannot be had."""
    from benchmarks import methods

    shape = methods.Shape(layer.query_heads[0], layer.heads, layer.dim)
    keys, values = layer.tokens(1, tokens + 40)
    new = layer.new(1, layer.query_heads[0])

    def run(name: str) -> None:
        case = f"T={tokens} B=1 Hq={shape.query_heads} {name}"
        try:
            if name in methods.PEERS:
                methods.try_peer(name, shape, keys)
            method = methods.filled_method(name, shape, keys, values, new[0], 8 * layer.steps)
        except methods.UnavailableError as error:
            layer.results.leave_out(case, str(error).partition("left out: ")[2])
            return
        timed(layer, case, lambda number: method.step(*new, method.mask(1)), method.bytes_read())

    each(layer, "peers", {name: partial(run, name) for name in (methods.STATIC, *methods.PEERS)}, 15)
