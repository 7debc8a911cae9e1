"""Small random models through ``generate()`` on a GPU, with every kind of cache; a few checks on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.gpu.generation import Check, checks, place
from benchmarks.gpu.settings import Settings

HERE = Settings(torch.device("cpu"), tiny=True)


@pytest.mark.cuda
@pytest.mark.parametrize("check", checks(Settings(torch.device("cuda"))), ids=lambda check: check.name)
def test_on_a_gpu(check: Check) -> None:
    assert check.problems(check.run()) == []


FEW = [
    "llama fp32, none, padded batch",
    "llama bf16, 4 bits",
    "deepseek fp32, latents",
    "llama fp32, snapkv, 4 bits",
    "llama fp32, 4 bits, copied and saved",
    "waits: llama bf16, 4 bits",
    "default device, 4 bits",
]


@pytest.mark.parametrize("name", FEW)
def test_the_checks_themselves(name: str) -> None:
    (check,) = (check for check in checks(HERE) if check.name == name)
    assert check.problems(check.run()) == []


@pytest.mark.slow
@pytest.mark.parametrize("check", checks(HERE), ids=lambda check: check.name)
def test_all_checks(check: Check) -> None:
    assert check.problems(check.run()) == []


def test_what_is_wrong_is_said() -> None:
    check = Check("any", dict, allowed=0.1, same=True)
    good = {"finite": True, "logits_error": 0.01, "same_tokens": True, "tokens_alike": 9, "tokens": 9, "margin": 1.0}
    assert check.problems(good) == []
    for change in (
        {"finite": False},
        {"logits_error": float("nan")},
        {"same_tokens": False},
        {"saved_alike": False},
        {"absorbed_steps": 0},
    ):
        assert len(check.problems(good | change)) == 1
    assert check.problems(good | {"same_tokens": False, "margin": 1e-5}) == []  # a tie


def test_a_warning_names_a_place_in_the_package() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.warn_explicit("called a synchronizing operation", UserWarning, "/a/b/hf_kvcache/layers/mla.py", 7)
    assert place(seen[0]) == "hf_kvcache/layers/mla.py:7"
