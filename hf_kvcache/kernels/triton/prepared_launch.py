"""Launches that are repeated with a few other arguments: of a compiled kernel that is kept, past Triton's checks.

An ordinary launch looks at every argument to find the compiled kernel that fits, which takes longer than the kernel of
a short sequence. A prepared launch does so once. It works with Triton 3.6 to 3.9, in the interpreter as an ordinary
launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs


class PreparedLaunch:
    """A launch of a kernel whose first arguments change from call to call: tensors, then numbers.

    Args:
        kernel: a ``@triton.jit`` function, which specializes on none of these numbers.
        grid: the programs, along two axes.
        arguments: all other arguments, by name. Tensors stay where they are.
        options: options of the compiler.

    Raises:
        ValueError: if the names are not those of the kernel's last arguments.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        names = kernel.arg_names[len(kernel.arg_names) - len(arguments) :]
        if set(names) != set(arguments):
            wrong = sorted(set(names) ^ set(arguments))
            raise ValueError(f"arguments={wrong} of a launch of {kernel.__name__}; accepted: its last ones, {names}")
        self._kernel, self._grid, self._options = kernel, grid, options
        self._rest = [arguments[name] for name in names]
        self._compiled: Any = None
        # What `compiled.run` takes before the stream, behind it, and behind the arguments that change.
        self._before: tuple[Any, ...] = ()
        self._after: tuple[Any, ...] = ()
        self._addresses: list[Any] = []

    def __call__(self, stream: int, tensors: tuple[torch.Tensor, ...], numbers: tuple[int, ...] = ()) -> None:
        """Launch on the current device.

        Args:
            stream: the current stream of the device, as its address.
            tensors: the tensors that change, with the dtypes of the first call.
            numbers: the numbers that change.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        unaligned = 0
        for address in addresses:
            unaligned |= address
        compiled, enter, leave = self._compiled, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # Triton compiles other code for pointers that are no multiples of 16 bytes, and hooks (of profilers) are told
        # of ordinary launches.
        if compiled is None or unaligned % 16 or _calls(enter) or _calls(leave):
            self._launch(tensors, numbers, not unaligned % 16)
            return
        compiled.run(*self._before, stream, *self._after, *addresses, *numbers, *self._addresses)

    def _launch(self, tensors: tuple[torch.Tensor, ...], numbers: tuple[int, ...], keep: bool) -> None:
        """Launch as usual, and keep the kernel that was compiled if ``keep``; the interpreter compiles none."""
        compiled = self._kernel[self._grid](*tensors, *numbers, *self._rest, **self._options)
        if not keep or compiled is None:
            return
        self._addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in self._rest]
        self._before = (*self._grid, 1)
        self._after = compiled.function, compiled.packed_metadata, None, None, None
        self._compiled = compiled


def _calls(hook: Any) -> bool:
    """Whether a hook of Triton's does anything: a chain of functions, or a function."""
    return hook is not None and bool(getattr(hook, "calls", True))


def current_stream(device: torch.device) -> int:
    """The address of the current stream of a device, as Triton launches on it; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream
