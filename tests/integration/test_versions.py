"""Releases of transformers differ in names: both names work, and unknown ones are found by trying."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_kvcache
from hf_kvcache.integration import versions
from tests import families
from tests.running import as_cache, full_cache, prompt, small_cache


def test_both_spellings(model: PreTrainedModel) -> None:
    """``generate`` takes a cache by the release's own name, and by the name of all releases before 6."""
    expected = model.generate(prompt(40), **as_cache(full_cache(model)), max_new_tokens=8, do_sample=False)
    for name in {versions.CACHE_ARGUMENT, "past_key_values"}:
        cache = small_cache(model)
        assert torch.equal(model.generate(prompt(40), **{name: cache}, max_new_tokens=8, do_sample=False), expected)
        assert cache.get_seq_length() == 47


def test_no_deprecation_warnings() -> None:
    """Generating and forward passes use nothing that transformers warns about."""
    model = families.build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = hf_kvcache.HeavyHitterCache(model.config, 40, "kvzip", tail_length=8, page_size=16)
        model.generate(prompt(60), **as_cache(cache), max_new_tokens=2, do_sample=False)
        cache.reset()
        model(prompt(60), **versions.with_cache(model, cache))
        cache.compress(model, prompt(60))
        other = hf_kvcache.HeavyHitterCache(model.config, 40, "expected", tail_length=8, page_size=16)
        model.generate(prompt(60), **as_cache(other), max_new_tokens=2, do_sample=False)


class _OldModel:
    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> None: ...


class _NewModel:
    def forward(self, input_ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> None: ...


class _TakesAnything:
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> None: ...


def test_models_of_older_code() -> None:
    """A model from outside of transformers gets its cache by the name that its own code uses."""
    assert versions.with_cache(_OldModel(), 1) == {"past_key_values": 1}
    assert versions.with_cache(_NewModel(), 1) == {"cache": 1}
    assert versions.cache_argument(_TakesAnything()) == versions.CACHE_ARGUMENT


class _Found(Exception):
    pass


class _StandIn:
    def update(self, *args: Any) -> None:
        raise _Found


class _Attention:
    """An attention module whose cache parameter has a name that no release uses."""

    def forward(self, hidden: int, dropout: float = 0.0, memory: Any = None, flag: bool = False) -> None:
        1.0 + dropout
        if memory is not None:
            memory.update(hidden)


class _WithoutUpdate:
    def forward(self, hidden: int, memory: Any = None) -> None: ...


def test_the_cache_argument_of_a_module_is_found_by_trying() -> None:
    """It is the parameter whose object's ``update`` is called; an error says if there is none."""
    for _ in range(2):  # found by trying, then remembered
        with pytest.raises(_Found):
            versions.ask_with_cache(_Attention(), {"hidden": 1, "unknown": 2}, _StandIn(), _Found)
    with pytest.raises(RuntimeError, match="writes nothing to a cache"):
        versions.ask_with_cache(_WithoutUpdate(), {"hidden": 1}, _StandIn(), _Found)


def test_only_one_module_lists_names() -> None:
    """No other file of the package uses a name that releases have changed, except in docstrings."""
    root = Path(hf_kvcache.__file__).parent
    names = re.compile(r"(?<!`)\b(past_key_values?|layer_past)\b(?!=cache``)")
    found = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if names.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"integration/versions.py"}
