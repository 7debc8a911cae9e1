"""Plans of well-known models, whose sizes are public, against arithmetic by hand; and bad input."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from hf_kvcache.cli.main import main
from hf_kvcache.planning import parse_bytes, parse_count, plan, textbook
from hf_kvcache.planning.caches import EXAMPLES, maker
from hf_kvcache.planning.plan import _most

FOLDER = Path(__file__).parent / "configs"
T = 131072
#: A layer of Kimi Linear or Qwen3-Next without attention: a state of 32 heads of 128 x 128 in float32.
_STATE = 32 * 128 * 128 * 4
#: What a page table has of a page of 128 tokens, a token.
_TABLE = 28 / 128


def _packed(width: int) -> float:
    """Bytes of a token of one KV head in 4 bits: two sides with a gain a token, and a scale a channel of 128 tokens."""
    return 2 * (width / 2 + 2 + 2 * width / 128) + _TABLE


#: Of a latent of 512 numbers in 4 bits with a scale and a zero for 64 of them, and a rotary key of 64 in 8 bits.
_LATENT = 512 / 2 + 512 / 64 * 4 + 64 + 4 + _TABLE
#: DeepSeek V4: an entry of 512 numbers and one of 128 of the indexer, in 4 and 8 bits with their scales, rounded up to
#: 16 bytes.
_ENTRY, _INDEXED = 352, 160


def _v4_full() -> int:
    """20 layers have an entry for 4 tokens, 23 for 128. All have a window, which transformers' layer counts as keys and
    as values, and the 20 the last window of compression, with gates in float32."""
    entries = 20 * T // 4 * (512 + 128) * 2 + 23 * T // 128 * 512 * 2
    return entries + 43 * (2 * 127 * 512 * 2 + 8) + 20 * 4 * (512 + 128) * (2 + 4)


def _v4_packed() -> int:
    """Rows have room for a sixteenth more; a window of 8 bits for 32 more; two windows of compression more, whose rows
    are twice as wide as an entry; and as many raw rows as fill a window."""
    entries = 20 * (T // 4) * 17 // 16 * (_ENTRY + _INDEXED) + 23 * (T // 128) * 17 // 16 * _ENTRY
    windows = 43 * (127 + 32) * 608 + 20 * 3 * 4 * (512 + 128) * (2 + 4)
    return entries + windows + 20 * 4 * 2 * (1024 + 256) * 2 + 23 * 128 * 2 * 512 * 2


#: Billions of weights; KV heads times width in all layers, as the textbook counts them; bytes a token of DynamicCache,
#: all layers; bytes of it that do not grow with the tokens; bytes a token in 4 bits. Layers with a window hold one
#: token less than it, and each of them a number of 8 bytes.
KNOWN = {
    "llama_3.1_8b": (8.03, 32 * 8 * 128, 2 * 32 * 8 * 128 * 2, 0, 32 * 8 * _packed(128)),
    "qwen3_30b_a3b": (30.5, 48 * 4 * 128, 2 * 48 * 4 * 128 * 2, 0, 48 * 4 * _packed(128)),
    "gemma_3_27b": (
        27.0,
        62 * 16 * 128,
        2 * 10 * 16 * 128 * 2,
        52 * (2 * 16 * 128 * 2 * 1023 + 8),
        10 * 16 * _packed(128),
    ),
    "gpt_oss_120b": (117, 36 * 8 * 64, 2 * 18 * 8 * 64 * 2, 18 * (2 * 8 * 64 * 2 * 127 + 8), 18 * 8 * _packed(64)),
    "deepseek_v3": (671, 61 * 128 * 64, 61 * (512 + 64) * 2, 0, 61 * _LATENT),
    "qwen3_next_80b_a3b": (
        80,
        48 * 2 * 256,
        2 * 12 * 2 * 256 * 2,
        36 * (_STATE + (2 * 16 + 32) * 128 * 4 * 2),
        12 * 2 * _packed(256),
    ),
    "kimi_linear_48b_a3b": (49, 27 * 32 * 64, 6 * (512 + 64) * 2, 21 * (_STATE + 3 * 32 * 128 * 4 * 2), 6 * _LATENT),
    # A fourth of the tokens in 20 layers, with a key of 128 for the indexer, and a 128th of them in 23. In 4 bits, room
    # for 1,024 // 16 entries more is 9 rows for each 8 where the number passes a multiple of 16.
    "deepseek_v4_flash": (
        284,
        43 * 512,
        20 * (512 + 128) * 2 // 4 + 23 * 512 * 2 // 128,
        _v4_full() - (20 * (512 + 128) * 2 // 4 + 23 * 512 * 2 // 128) * T,
        20 * (_ENTRY + _INDEXED) / 4 * 17 / 16 + 23 * _ENTRY * 9 / 1024,
    ),
}


def config_of(name: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(FOLDER / f"{name}.json")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "llama_3.1_8b" else pytest.mark.slow) for n in KNOWN]
)
def test_known_models(name: str) -> None:
    """Each figure of the table in docs/planning.md."""
    billions, textbook_width, per_token, constant, packed_token = KNOWN[name]
    found = plan(config_of(name), T, 1, ["full", "quantized:4"], torch.bfloat16)
    full, packed = found.caches
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert found.textbook is not None and found.textbook.bytes(T) == 2 * 2 * textbook_width * T
    assert full.bytes_per_token == per_token
    assert full.bytes == per_token * T + constant
    assert packed.bytes_per_token == packed_token
    if name.startswith("deepseek_v4"):
        assert packed.bytes == _v4_packed()
    else:  # all but sinks, tail and a page that is being filled; windows and states take no more than in full
        most = constant + 260 * 2 * 2 * textbook_width
        assert packed_token * (T - 260) < packed.bytes < packed_token * T + most
    shown = [found.parameters / 1e9, *(x / 2**30 for x in (found.textbook.bytes(T), full.bytes, packed.bytes))]
    assert [*(f"{x:.2f}" for x in shown), f"{per_token:,}"] == _documented(name)


def _documented(name: str) -> list[str]:
    """The figures of a model's row in the documentation."""
    lines = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (row,) = [row for row in rows if len(row) == 6 and row[0].lower().replace("-", "_") == name]
    return row[1:]


def test_textbook_formula() -> None:
    """Llama-3.1-8B in fp16: 0.125 MiB a token with its 8 KV heads, 0.5 MiB with 32; 16 and 64 GiB at 128k."""
    formula = textbook(config_of("llama_3.1_8b"), torch.float16)
    assert (formula.bytes_per_token, formula.bytes_per_token_unshared) == (2**17, 2**19)
    assert formula.bytes(T) == 16 * 2**30 and formula.bytes_per_token_unshared * T == 64 * 2**30


def test_what_fits_and_the_floor_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four layers of Llama-3.1-8B: 2**14 bytes a token, 2**31 bytes at 128k."""
    config = json.loads((FOLDER / "llama_3.1_8b.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--model", str(tmp_path), "--memory", "8GB", "--bandwidth", "2000GB/s"]
    assert main(["plan", *arguments, "--dtype", "bf16", "--caches", "full,quantized:4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    full, packed = found["caches"]
    room = 8 * 10**9 - found["weight_bytes"]
    assert full["longest_context"] == room // 2**14 and full["largest_batch"] == room // 2**31
    assert full["step_floor_ms"] == pytest.approx((found["weight_bytes"] + 2**31) / 2e9)
    assert 3.5 < packed["longest_context"] / full["longest_context"] < 4 and found["textbook"]["bytes"] == 2**31


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere.json"], "--model='./nowhere.json': there is no such file or folder"),
        (["--model", "{here}", "--plot", "no/such/plan.png"], "--plot='no/such/plan.png': there is no such folder"),
        pytest.param(["--model", "{here}", "--plot", "plan.bmp"], "'bmp'; accepted", marks=pytest.mark.slow),
    ],
)
def test_bad_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before anything is planned, and the process says so with its exit status."""
    here = str(FOLDER / "llama_3.1_8b.json")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "argv", ["hf-kvcache", "plan", *(x.format(here=here) for x in arguments)])
        runpy.run_module("hf_kvcache.cli", run_name="__main__")
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


def test_the_most_that_fits() -> None:
    """Steps and jumps of a size are found exactly, whatever the room."""

    def size(n: int) -> int:
        return 100 + n // 7 * 50 + (1000 if n > 40 else 0)

    for room in range(0, 3000, 7):
        right = max((n for n in range(1, 500) if size(n) <= room), default=0)
        assert _most(size, room, 10**6) == right
    assert _most(size, 10**9, 64) == 64


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("llama_3.1_8b")
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    arguments = ["--context", "4k", "--caches", "full,none,kvzip:1k", "--plot", str(tmp_path / "plan.png")]
    assert main(["plan", "--model", str(tmp_path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "kvzip:1k: bytes after compress(" in printed and "peak: the most held" in printed
    assert "32.00 MiB" in printed and "8,192 bytes a token" in printed and "1.49 billion" in printed
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_names() -> None:
    """Every example, and both forms of a budget, make the cache that they say."""
    config = AutoConfig.for_model("llama", num_hidden_layers=3)
    for name in EXAMPLES:
        assert name.startswith("lowrank") or maker(name)(config) is not None
    packed: Any = maker("ada-snapkv:2k+8:4bits")(config)
    assert (packed.budget, packed.policy.head_floor) == (2048, 0.2)
    assert (packed.codec.key_bits, packed.codec.value_bits) == (8, 4)
    window: Any = maker("window:4k:8+int4")(config)
    assert (window.budget, window.options.sink_length, window.codec.name) == (4096 + 8, 8, "int")
    share: Any = maker("h2o:.25")(config)
    assert (share.budget, share.codec.name) == (0.25, "none")


def test_sizes() -> None:
    assert parse_count("context", "128k") == T and parse_count("context", 7) == 7
    assert parse_bytes("memory", "80GB") == 80 * 10**9 and parse_bytes("memory", "1.5 GiB") == 3 * 2**29
    assert parse_bytes("bandwidth", "3350GB/s") == 3350 * 10**9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": "lots"}, "context='lots'; accepted: a positive whole number"),
        ({"context": 0}, "context=0; accepted"),
        ({"batch": 0}, "batch=0"),
        ({"memory": "80 GPUs"}, "memory='80 GPUs'; accepted: a positive number of bytes"),
        ({"caches": ["quantised:4"]}, "'quantised:4'; accepted: 'full'"),
        ({"caches": ["quantized:four"]}, "'quantized:four'; accepted: 'full'"),
        ({"caches": ["snapkv"]}, "'snapkv'; accepted: 'full'.*'POLICY:BUDGET'"),
        ({"caches": ["snapvk:1024"]}, "'snapvk:1024'; accepted: .*snapkv, streaming.*ada-"),
        ({"caches": ["snapkv:1.5"]}, "'snapkv:1.5'; accepted"),
        ({"caches": ["snapkv:0.0"]}, "'snapkv:0.0'; accepted"),
        ({"caches": ["ada:0.5"]}, "'ada:0.5'; accepted"),
        ({"caches": ["snapkv:1k+5bit"]}, "'snapkv:1k[+]5bit'; accepted: .*[+]BITSbits"),
        ({"caches": ["none@lots"]}, "'none@lots'; accepted: .*@TOKENS"),
        ({"caches": ["full@4k"]}, "'full@4k'; accepted"),
        ({"caches": ["sparse:moments"]}, "'sparse:moments'; accepted: .*sparse:SELECTOR:BUDGET"),
        ({"caches": ["sparse:question:64"]}, "'sparse:question:64'; accepted: .*Selectors: kascade, .*quest"),
        ({"caches": ["window:0.5"]}, "'window:0.5'; accepted"),
        ({"caches": ["window:4k:few"]}, "'window:4k:few'; accepted"),
        ({"caches": ["lowrank:half"]}, "'lowrank:half'; accepted"),
        ({"caches": ["lowrank:0.5+8:4bits"]}, "'lowrank:0.5[+]8:4bits'; accepted: .*not with lowrank"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(config_of("llama_3.1_8b"), **arguments)  # type: ignore[arg-type]
