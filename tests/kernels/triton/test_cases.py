"""Cases of the GPU check in the interpreter: every operation twice, with NaN in all memory that it has to write."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.settings import Settings, backend
from hf_kvcache.kernels import workspace
from tests.kernels.triton.fixtures import bfloat16_dot, poisoned_outputs  # noqa: F401

CASES = cases(Settings(torch.device("cpu"), tiny=True))
#: What the other tests of this folder do not call twice, as pieces of a case's name.
FEW = (
    "none bf16 .* window=300",
    "none bf16 batch=2 .* queries=18",
    "column_sums rotated8 bf16",
    "latent_attend rotated8.None bf16 heads=16 queries=1",
    "hadamard fp16",
    "pack fp32 unbiased4",
)


def run(case: Case) -> list[str]:
    """What is wrong with a case, of which no call finds results of an earlier one in its memory."""
    for (_, _, device, _), buffer in workspace._local.__dict__.get("buffers", {}).items():
        if device.type == "cpu":  # other tests of the process may have had a pretended device
            buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer.fill_(-1)
    with backend("triton"):
        return case.problems(case.run())


@pytest.mark.parametrize("pattern", FEW)
def test_a_few(pattern: str) -> None:
    case = next(case for case in CASES if re.search(pattern, case.name))
    assert run(case) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all(case: Case) -> None:
    assert run(case) == []
