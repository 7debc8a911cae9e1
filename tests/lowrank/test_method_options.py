"""The options of methods, and what a method needs of a layer."""

from __future__ import annotations

from typing import Any

import pytest

from hf_kvcache.lowrank.basis import LayerBasis
from hf_kvcache.lowrank.methods import resolve
from tests.lowrank.structured import TOKENS, make, moments_of


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pca", {}, ["method='pca'", "kq_svd", "palu", "svd"]),
        (None, {}, ["method=None", "kq_svd"]),
        ("svd", {"group": 2}, ["svd", "'group'", "none"]),
        ("kq_svd", {"groups": 2}, ["kq_svd", "'groups'", "group", "before_rope", "center"]),
        ("kq_svd", {"group": 0}, ["group=0"]),
        ("kq_svd", {"group": True}, ["group=True"]),
        ("kq_svd", {"before_rope": 1}, ["before_rope=1", "True"]),
        ("palu", {"center": "all"}, ["center='all'", "none", "keys", "values", "both"]),
    ],
)
def test_bad_options(name: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        resolve(name, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_layers_that_a_method_is_not_for() -> None:
    layer = make(heads=3, ratio=1)
    moments = moments_of(layer)
    with pytest.raises(ValueError, match=r"group=2 does not divide 3 KV heads; accepted: \[1, 3\]"):
        resolve("kq_svd", group=2).solve(moments)
    for name in ("kq_svd", "palu"):
        with pytest.raises(ValueError, match=r"before_rope=True.*cannot be undone"):
            resolve(name, before_rope=True).solve(moments)
    object.__setattr__(moments, "output", None)
    with pytest.raises(ValueError, match="needs the plain weight"):
        resolve("kq_svd").solve(moments)
    assert isinstance(resolve("svd").solve(moments), LayerBasis)


def test_ready_made() -> None:
    method = resolve("palu", group=2)
    assert resolve(method) is method
    assert method.options() == {"group": 2, "before_rope": False, "center": "none"}
    assert resolve("svd").options() == {}
    with pytest.raises(ValueError, match="ready-made"):
        resolve(method, group=2)
    assert TOKENS > 16  # fewer tokens than directions would make every method exact
