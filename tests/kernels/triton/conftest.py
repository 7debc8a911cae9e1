"""Runs the Triton kernels in Triton's interpreter, or on a GPU where ``TRITON_INTERPRET=0`` is set.

``@triton.jit`` decides as it meets a function whether that will be compiled or interpreted. So this file imports every
kernel with ``TRITON_INTERPRET=1``, before a test module can. Triton's own library (``tl.sum``, ``tl.zeros``) may have
been imported long before, by transformers, as functions to be compiled: they are exchanged while the tests here run.

A process that has collected these tests cannot compile the kernels: a compile report needs a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_kvcache.kernels.dispatch import OPERATIONS, module_of

VARIABLE = "TRITON_INTERPRET"
INTERPRETED = os.environ.get(VARIABLE, "1") == "1"

pytest.importorskip("triton", exc_type=ImportError)

with pytest.MonkeyPatch.context() as _patch:
    if INTERPRETED:
        _patch.setenv(VARIABLE, "1")
    for _op in OPERATIONS["triton"]:
        module_of(_op, "triton")


@pytest.fixture(scope="package", autouse=True)
def interpreter() -> Iterator[None]:
    """Triton's library interpreted, and the variable set, while the tests of this folder run.

    Pages are made and compared by the reference, not by the native kernels.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_KVCACHE_BACKEND", "reference")
        if not INTERPRETED:
            yield
            return
        patch.setenv(VARIABLE, "1")
        interpreted: dict[int, InterpretedFunction] = {}
        for scope in (tl, tl.standard, tl.core, tl.math, tl.random, tl.tensor):
            for name, function in list(vars(scope).items()):
                if isinstance(function, JITFunction):
                    # One object each: reductions know their combine function by identity.
                    known = interpreted.setdefault(id(function), InterpretedFunction(function.fn))
                    patch.setattr(scope, name, _method(known) if scope is tl.tensor else known)
        yield


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a plain function, which unlike other callables becomes a method as an attribute of a class."""

    def method(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


@pytest.fixture
def device() -> torch.device:
    """Where the tensors of a test are."""
    return torch.device("cpu" if INTERPRETED else "cuda")
