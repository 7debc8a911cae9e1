"""A default device or dtype that is not the model's: ``torch.set_default_device`` and the like change nothing.

The default device here is ``meta``, whose tensors have no memory: one that the package made there by mistake could not
be computed with.
"""

from __future__ import annotations

import ast
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_kvcache
from hf_kvcache.codecs import lloyd
from hf_kvcache.kernels.reference.hadamard import rotation_signs
from tests.families import build
from tests.generation.kinds import KINDS, Kind
from tests.running import forward, one_of_each_codec, prompt, small_cache

#: Functions of torch that make a tensor on the default device unless they are told another.
_FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"}
_FACTORIES |= {"randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}
#: Those of them that make floats unless they are told another dtype.
_OF_FLOATS = {"empty", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"}
#: Folders in which a float of another dtype would be wrong: kernels read and write float32.
_IN_FLOAT32 = ("cache", "codecs", "eviction", "integration", "kernels", "layers", "sparse", "storage")


def _run(kind: Kind, device: str) -> list[torch.Tensor]:
    """Logits of some steps, and what a cache says of itself, under a default device."""
    model, first, steps = kind.build(), prompt(60, 2), [prompt(20, 2, seed=1), prompt(20, 2, seed=2)]
    order, cache = torch.tensor([1, 0]), kind.cache(model)
    with torch.device(device):
        found = [forward(model, first, cache)]
        found += [forward(model, token, cache) for token in steps[0].split(1, 1)]
        cache.reorder_cache(order)
        found += [forward(model, steps[1], cache.fork())]
        found += [x for name, x in cache.state_dict().items() if name != "meta"]
        cache.memory()
        cache.integrity()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str) -> None:
    wanted = _run(KINDS[kind], "cpu")
    try:
        found = _run(KINDS[kind], "meta")
    except NotImplementedError as error:
        package = str(Path(hf_kvcache.__file__).parent)
        if any(frame.filename.startswith(package) for frame in traceback.extract_tb(error.__traceback__)):
            raise
        pytest.skip(f"the model of transformers makes a tensor on the default device: {error}")
    assert len(found) == len(wanted) > 20
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("codec", one_of_each_codec())
def test_every_codec(codec: str) -> None:
    model, ids, steps = build("llama"), prompt(60), prompt(20, seed=1)
    wanted, cache = None, None
    for device in ("cpu", "meta"):
        with torch.device(device):
            cache = small_cache(model, codec)
            found = torch.cat([forward(model, part, cache) for part in (ids, *steps.split(1, 1))], 1)
        assert wanted is None or torch.equal(found, wanted)
        wanted = found


@pytest.mark.parametrize("kind", ["rotated4", "snapkv", "reindexed", "latents", "sparse"])
def test_default_dtype(kind: str) -> None:
    """Kernels write float32, also where a program has made bfloat16 the default."""
    of = KINDS[kind]
    model, ids, steps = of.build(), prompt(60, 2), prompt(20, 2, seed=1)
    wanted, dtype = None, torch.get_default_dtype()
    for default in (torch.bfloat16, dtype):
        cache = of.cache(model)
        torch.set_default_dtype(default)
        try:
            found = torch.cat([forward(model, part, cache) for part in (ids, *steps.split(1, 1))], 1)
        finally:
            torch.set_default_dtype(dtype)
        assert wanted is None or torch.equal(found, wanted)
        wanted = found


def test_default_dtype_of_what_is_kept() -> None:
    """Levels and signs are made once in a process, and C++ reads the signs by their address."""

    def made() -> list[torch.Tensor]:
        return [*lloyd._grid.__wrapped__(3, torch.device("cpu")), rotation_signs.__wrapped__(64, "signed_hadamard")]

    wanted, dtype = made(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = made()
    finally:
        torch.set_default_dtype(dtype)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_every_new_tensor_says_where_and_of_what() -> None:
    """What tests do not reach: policies, calibration, kernels for GPUs."""
    assert not list(_unsaid(Path(hf_kvcache.__file__).parent))


def _unsaid(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        in_float32 = path.relative_to(package).parts[0] in _IN_FLOAT32
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if not isinstance(call.func.value, ast.Name) or call.func.value.id != "torch":
                continue
            named, name = {keyword.arg for keyword in call.keywords}, call.func.attr
            if (name in _FACTORIES and "device" not in named) or (
                in_float32 and name in _OF_FLOATS and "dtype" not in named
            ):
                yield f"{path.name}:{call.lineno}: {ast.unparse(call)}"
