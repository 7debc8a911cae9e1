"""What ``bits=`` and ``skip_layers=`` accept, and what they say of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.codecs.layer_bits import LayerBits, Widths
from hf_kvcache.integration.model_identity import model_identity
from hf_kvcache.planning.caches import maker
from tests import families

CONFIG = LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)


def widths(cache: KVCache) -> list[tuple[int | None, int | None]]:
    codecs = [layer.options.codec for layer in cache.own_layers]
    return [(codec.key_bits, codec.value_bits) for codec in codecs]


FULL = (None, None)
SAME: list[tuple[dict[str, Any], list[tuple[int | None, int | None]]]] = [
    ({"bits": {"layers": {0: 8, "1-2": {"keys": 3, "values": 2}}, "default": 1}}, [(8, 8), (3, 2), (3, 2), (1, 1)]),
    ({"bits": {"layers": {"-1": 8, 0: 4}, "default": 2}}, [(4, 4), (2, 2), (2, 2), (8, 8)]),
    ({"bits": [8, {"keys": 8, "values": 4}, 2, 3]}, [(8, 8), (8, 4), (2, 2), (3, 3)]),
    ({"bits": {"keys": 8, "values": 4}}, [(8, 4)] * 4),
    ({"bits": 2, "skip_layers": (0, -1)}, [FULL, (2, 2), (2, 2), FULL]),
    ({"bits": {"default": 3}, "skip_layers": [1]}, [(3, 3), FULL, (3, 3), (3, 3)]),
    ({"codec": "kvarn3", "skip_layers": [0]}, [FULL, (3, 3), (3, 3), (3, 3)]),
    ({"skip_layers": range(4)}, [FULL] * 4),
]


@pytest.mark.parametrize(("arguments", "expected"), SAME)
def test_widths(arguments: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    assert widths(QuantizedKVCache(CONFIG, bind=False, **arguments)) == expected


def test_the_index_is_that_of_the_model() -> None:
    """Layers without keys and values count, and have no width."""
    config = families.build("qwen3_next").config  # linear attention, then full attention twice
    for bits in ({"layers": {1: 8}, "default": 4}, [None, 8, 4], {"layers": {"0-1": 8}, "default": 4}):
        assert widths(QuantizedKVCache(config, bits=bits, bind=False)) == [(8, 8), (4, 4)]
    for arguments, words in (
        ({"bits": {"layers": {0: 8}, "default": 4}}, r"layer 0 stores no keys and values of its own; accepted: 1-2"),
        ({"bits": [8, 8, 4]}, r"bits\[0\]=8.*accepted: None"),
        ({"skip_layers": (0, -1)}, r"skip_layers: layer 0 stores no keys"),
    ):
        with pytest.raises(ValueError, match=words):
            QuantizedKVCache(config, bind=False, **arguments)


def test_layers_that_read_the_keys_of_others_have_no_width() -> None:
    config = families.build("gemma3n").config
    assert (config.num_hidden_layers, config.num_kv_shared_layers) == (4, 2)
    assert widths(QuantizedKVCache(config, bits={"layers": {0: 8}, "default": 4}, bind=False)) == [(8, 8), (4, 4)]
    with pytest.raises(ValueError, match=r"skip_layers: layer -1 stores no keys .*accepted: 0-1"):
        QuantizedKVCache(config, bits=4, skip_layers=[-1], bind=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": {"layers": {9: 8}, "default": 1}}, r"bits\['layers'\]\[9\]: layer 9; accepted.* -4 to 3"),
        ({"bits": {"layers": {-5: 8}, "default": 1}}, r"layer -5; accepted.* -4 to 3"),
        ({"bits": {"layers": {1.5: 8}, "default": 1}}, r"\[1.5\]: layer 1.5; accepted: whole numbers"),
        ({"bits": {"layers": {"--1": 8}, "default": 1}}, r"'--1'\]; accepted: a layer"),
        ({"bits": {"layers": {"2-9": 8}, "default": 1}}, r"'2-9'.*accepted: parts of 0-3"),
        ({"bits": {"layers": {"a": 8}, "default": 1}}, r"'a'\]; accepted: a layer"),
        ({"bits": {"layers": {0: 8, "0-1": 4}, "default": 1}}, r"layer 0 has widths already"),
        ({"bits": {"layers": {0: 5}, "default": 1}}, r"=5; accepted: widths of \[1, 2, 3, 4, 8\]"),
        ({"bits": {"layers": {0: 4}}}, r"nothing of layers 1-3; accepted.*'default'"),
        ({"bits": {"layers": {0: 4}, "rest": 4}}, r"accepted: a width, "),
        ({"bits": {"keys": 4}}, r"accepted: a width, "),
        ({"bits": [1, 2]}, r"2 entries; accepted: 4"),
        ({"bits": [8, 4, [1], 2]}, r"bits\[2\]=\[1\]; accepted: widths"),
        ({"bits": [8, 4, None, 2]}, r"nothing of layers 2"),
        ({"bits": 2.5}, r"bits=2.5; accepted"),
        ({"bits": [1, 2, 3, 4], "key_bits": 3}, r"key_bits= with bits="),
        ({"bits": {"layers": {0: {"keys": 8, "values": 1}}, "default": 1}}, r"no codec has both widths"),
        ({"skip_layers": "0"}, r"skip_layers='0'; accepted: a list or tuple"),
        ({"skip_layers": 0}, r"skip_layers=0; accepted: a list or tuple"),
        ({"skip_layers": (True,)}, r"skip_layers: layer True"),
    ],
)
def test_errors(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantizedKVCache(CONFIG, bind=False, **arguments)


def test_file(tmp_path: Path) -> None:
    made = LayerBits({0: Widths(4, 2), 1: Widths(2, 2), 2: Widths(2, 1), 3: Widths(8, 8)}, model_identity(CONFIG))
    path = tmp_path / "bits.json"
    made.save(path)
    assert LayerBits.load(path) == made
    expected = [(4, 2), (2, 2), (2, 1), (8, 8)]
    for bits in (made, path, str(path)):
        assert widths(QuantizedKVCache(CONFIG, bits=bits, bind=False)) == expected
    planned: Any = maker(f"quantized:{path}")(CONFIG)
    assert widths(planned) == expected
    other: PreTrainedConfig = LlamaConfig(hidden_size=64, num_hidden_layers=5, num_attention_heads=4, vocab_size=64)
    with pytest.raises(ValueError, match="was made with layers=4, this model has 5"):
        QuantizedKVCache(other, bits=path, bind=False)
    for text, words in (
        ("{", "cannot be read"),
        ("{}", "no file of bits"),
        (path.read_text().replace("keys", "sides"), "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            LayerBits.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        QuantizedKVCache(CONFIG, bits=tmp_path / "none.json", bind=False)
