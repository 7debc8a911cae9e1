"""When a prepared launch goes to the kept kernel, and when through Triton."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs

from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch


class Kernel:
    """A kernel that notes how it is launched, in place of a compiled one."""

    __name__ = "kernel"
    arg_names = ("x", "number", "held", "SIZE")

    def __init__(self) -> None:
        self.usual: list[Any] = []
        self.kept: list[Any] = []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.usual.append((grid, arguments, options))
            return SimpleNamespace(
                run=lambda *arguments: self.kept.append(arguments), function="function", packed_metadata="metadata"
            )

        return launch


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def prepared(kernel: Kernel, held: torch.Tensor) -> PreparedLaunch:
    return PreparedLaunch(kernel, (3, 4), {"SIZE": 8, "held": held}, {"num_warps": 2})


def test_the_second_launch_is_that_of_the_kept_kernel(kernel: Kernel) -> None:
    held, x, other = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    launch = prepared(kernel, held)
    launch(7, (x,), (5,))
    assert kernel.usual == [((3, 4), (x, 5, held, 8), {"num_warps": 2})] and not kernel.kept
    launch(9, (other,), (6,))
    addresses = other.data_ptr(), 6, held.data_ptr(), 8
    assert kernel.kept == [(3, 4, 1, 9, "function", "metadata", None, None, None, *addresses)]
    assert len(kernel.usual) == 1


def test_other_alignments_are_left_to_triton(kernel: Kernel) -> None:
    """A kernel that was compiled for aligned pointers would read others wrongly."""
    launch, x = prepared(kernel, torch.zeros(4)), torch.zeros(8)
    for tensor, usual, kept in ((x[1:], 1, 0), (x[1:], 2, 0), (x, 3, 0), (x, 3, 1), (x[1:], 4, 1), (x[4:], 4, 2)):
        launch(0, (tensor,), (1,))
        assert (len(kernel.usual), len(kernel.kept)) == (usual, kept)


def test_hooks_see_every_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, x = prepared(kernel, torch.zeros(4)), torch.zeros(4)
    launch(0, (x,), (1,))
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    launch(0, (x,), (1,))
    assert len(kernel.usual) == 2 and not kernel.kept


def test_arguments_that_do_not_fit(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match=r"\['SIZE', 'WIDTH'\] of a launch of kernel; accepted: its last ones"):
        PreparedLaunch(kernel, (1, 1), {"held": 1, "WIDTH": 2}, {})
