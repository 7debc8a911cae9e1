"""States and modules that do not go with a layer's projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.layers import states
from tests.lowrank.one_layer import DIM, FORMS, HEADS, OneLayer, oblique, rotation
from tests.running import PAGE, SINKS, TAIL


def test_another_model() -> None:
    """Keys with other heads or widths than the projection's are refused before anything is stored."""
    layer = OneLayer("full", rotation(HEADS, (DIM, DIM), 2)).layer
    for heads, key_dim, value_dim in ((4, DIM, DIM), (HEADS, 8, DIM), (HEADS, DIM, 8)):
        with pytest.raises(ValueError, match="accepted by its projection: 2 of widths"):
            layer.update(torch.zeros(1, heads, 3, key_dim), torch.zeros(1, heads, 3, value_dim))
        assert layer.get_seq_length() == 0 and layer.storage is None


def test_a_rank_that_the_codec_cannot_store() -> None:
    """Ten coefficients of 4 bits do not fill whole bytes."""
    layer = OneLayer("full", oblique(2, (8, 10)), "int4").layer
    with pytest.raises(ValueError, match="10"):
        layer.update(torch.zeros(1, HEADS, 3, DIM), torch.zeros(1, HEADS, 3, DIM))
    assert layer.storage is None


def test_an_embedding_that_cannot_be_undone() -> None:
    """Where the layer has no rotary embedding, a basis of keys before it is refused at the first attention."""
    layer, tokens = OneLayer("full", FORMS["before rope"]), states(60)
    module: Any = torch.nn.Identity()
    module.is_causal, module.num_key_value_groups, layer.attention = True, 2, module
    with pytest.raises(ValueError, match=r"layer 0 .*before_rope=True.*has no rotary embedding"):
        layer(tokens)
    storage = layer.layer.storage
    assert storage is not None and storage.dense.longest == 0 and storage.table.columns == 0


def test_a_module_that_is_not_known() -> None:
    """An implementation that reads dense tensors shows no module, which is no error until something is packed."""
    own, tokens = OneLayer("full", FORMS["before rope"]).layer, states(60)
    room = SINKS + TAIL + PAGE - 1
    first = tokens.at(0, room)
    keys, _ = own.update(first.key, first.value)
    assert torch.equal(keys + 0, first.key)
    second = tokens.at(room, room + 1)
    own.update(second.key, second.value)
    third = tokens.at(room + 1, room + 2)
    with pytest.raises(RuntimeError, match="need the attention module"):
        own.update(third.key, third.value)
    assert own.get_seq_length() == room + 1
    assert own.storage is not None and own.storage.dense.longest == room and own.storage.table.columns == 0
