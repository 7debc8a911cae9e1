"""A default device that is not the model's: ``torch.set_default_device`` and ``with torch.device(...)`` change nothing.

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
from tests.families import build
from tests.generation.kinds import KINDS, Kind
from tests.running import forward, one_of_each_codec, prompt, small_cache

#: Functions of torch that make a tensor on the default device unless they are told another.
_FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"}
_FACTORIES |= {"randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}


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


def test_every_new_tensor_says_where() -> None:
    """What tests do not reach: policies, calibration, kernels for GPUs."""
    assert not list(_without_device(Path(hf_kvcache.__file__).parent))


def _without_device(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
            named = any(keyword.arg == "device" for keyword in call.keywords)
            if of_torch and call.func.attr in _FACTORIES and not named:
                yield f"{path.name}:{call.lineno}: {ast.unparse(call)}"
