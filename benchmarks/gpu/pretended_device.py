"""Tensors that say they are on ``cuda:0`` and lie in the memory of the host: what a GPU would be asked, without one.

While a :class:`PretendedDevice` is active, ``device="cuda"`` works as on a machine with a GPU: ``is_cuda`` and
``device`` are what the package's branches expect, tensors of both devices do not mix, ``numpy()`` fails. Operators are
computed on the host with their true values. Every launch, upload, read-back and wait is counted, with the line of the
package that asked for it.

Not seen: the time anything takes, streams (each does its work at once) and what they race for, the values that Triton
kernels would write (memory is 0 until an operator fills it), memory that runs out, which of several algorithms cuBLAS
or SDPA chooses, and a view whose memory layout would be another on a GPU. A tensor made with ``set_`` or resized in
place is an error.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_kvcache
from hf_kvcache.integration import mla, picks

DEVICE = torch.device("cuda", 0)
#: The limits of an H100.
PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
#: What is counted. An operator is a torch operator that launches at least one kernel; an upload copies from the host, a
#: read-back to the host; the CPU waits for the GPU in a wait, and most read-backs are waits too.
KINDS = ("kernels", "operators", "uploads", "readbacks", "waits")
#: Operators that launch nothing though their result is no view.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias"}
_FREE |= {"set_", "_unsafe_view", "_reshape_alias"}
#: Operators whose result has a size, or is a number, that the host has to know.
_WAITING = {"nonzero", "masked_select", "unique", "unique2", "_unique", "_unique2", "unique_consecutive", "unique_dim"}
_WAITING |= {"equal", "is_nonzero", "_local_scalar_dense", "repeat_interleave", "bincount"}
_WAITING |= {"_linalg_check_errors"}
#: Operators that copy between devices.
_COPIES = ("_to_copy", "copy_", "copy")
_ACTIVE: list[PretendedDevice] = []
_PACKAGE = str(Path(hf_kvcache.__file__).parent)


class OnDevice(torch.Tensor):
    """A tensor on the pretended GPU.

    Attributes:
        held: its contents, on the CPU.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in (torch.Tensor, torch.nn.Parameter, OnDevice) for kind in types):
            return NotImplemented  # for a tensor of the package, which knows what to do
        raise RuntimeError(f"{func} outside of the pretended device: its tensors can be used nowhere else")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return current().read(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        current().write(self, index, value)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        same = self.is_contiguous(memory_format=memory_format)
        return self if same else torch.ops.aten.clone(self, memory_format=memory_format)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return torch.ops.aten.copy_(self, source, non_blocking)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found = torch.ops.aten.nonzero(self)
        return found.unbind(1) if as_tuple else found

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _to(self, *args, **kwargs)

    def __invert__(self) -> torch.Tensor:
        return torch.bitwise_not(self)

    def record_stream(self, stream: Any) -> None:
        pass  # memory is freed as on the host

    def item(self) -> Any:
        if self.numel() != 1:
            raise RuntimeError(f"a Tensor with {self.numel()} elements cannot be converted to Scalar")
        return torch.ops.aten._local_scalar_dense(self)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        return self.clone()  # type: ignore[return-value]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"


class Counted:
    """Counts of one stretch of a program.

    Attributes:
        own: what the package asked for, by kind.
        all: what the whole program asked for, by kind.
        places: how often each line of the package asked for each kind: ``(kind, "file:line operator")``.
    """

    def __init__(self) -> None:
        self.own: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.all: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.places: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, name: str) -> None:
        """Count one event with the name of its operator or kernel."""
        self.all[kind] += 1
        place = _place()
        if place is not None:
            self.own[kind] += 1
            self.places[kind, f"{place} {name}"] += 1

    def lines(self, kinds: Sequence[str] = KINDS) -> list[str]:
        """Where the package asked for what, those first that asked most often."""
        found = [(n, kind, place) for (kind, place), n in self.places.most_common() if kind in kinds]
        return [f"{n} {kind} {place}" for n, kind, place in found]


def _place() -> str | None:
    """The line of the package that is being run; None where the code of transformers, or of nobody, is."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return f"hf_kvcache{name[len(_PACKAGE) :]}:{frame.f_lineno}"
        if "/transformers/" in name:
            return None
        frame = frame.f_back
    return None


class PretendedDevice(contextlib.ExitStack):
    """While it is active, ``"cuda"`` is a device whose tensors are :class:`OnDevice`.

    Attributes:
        total: all that was counted so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = Counted()
        self.sync_debug_mode = "default"
        self._counters = [self.total]

    def __enter__(self) -> PretendedDevice:
        super().__enter__()
        self.enter_context(torch.no_grad())  # autograd asks a GPU for its streams
        for name, value in _of_torch_cuda(self).items():
            self.enter_context(patch.object(torch.cuda, name, value))
        self.enter_context(patch.object(mla, "_split_if_plain", _split_if_plain))
        self.enter_context(patch.object(picks, "_is_plain", lambda x: type(x) is OnDevice))
        self.enter_context(_Functions(self))
        self.enter_context(_Operators(self))
        _ACTIVE.append(self)
        self.callback(_ACTIVE.remove, self)
        return self

    def add(self, kind: str, name: str) -> None:
        """Count an event; a wait is an error or a warning where ``torch.cuda.set_sync_debug_mode`` says so."""
        for counter in self._counters:
            counter.add(kind, name)
        if kind == "waits" and self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
        if kind == "waits" and self.sync_debug_mode == "warn":
            warnings.warn(f"called a synchronizing CUDA operation: {name}", stacklevel=4)

    def set_sync_debug_mode(self, mode: str) -> None:
        """As ``torch.cuda.set_sync_debug_mode``."""
        self.sync_debug_mode = mode

    def read(self, tensor: OnDevice, index: Any) -> OnDevice:
        """``tensor[index]``: torch's own way to the operators needs a GPU."""
        self._count_index(index)
        if any(isinstance(part, (torch.Tensor, list, np.ndarray)) and not _is_number(part) for part in _parts(index)):
            self.add("operators", "index")
        place = tuple(_held_index(part) for part in _parts(index))
        with no_dispatch():
            return OnDevice(tensor.held[place])

    def write(self, tensor: OnDevice, index: Any, value: Any) -> None:
        """``tensor[index] = value``."""
        masks = [part for part in _parts(index) if _is_mask(part)]
        if not (len(masks) == 1 and not isinstance(value, torch.Tensor)):  # torch fills where a mask says so
            self._count_index(index)
        self.add("operators", "index_put_")
        if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) and value.dim():
            self.add("uploads", "index_put_")
            self.add("waits", "index_put_")
        place = tuple(_held_index(part) for part in _parts(index))
        with no_dispatch():
            tensor.held[place] = _held(value)

    def _count_index(self, index: Any) -> None:
        for part in _parts(index):
            on_device = isinstance(part, OnDevice)
            if isinstance(part, (list, np.ndarray)) or (
                isinstance(part, torch.Tensor) and not on_device and part.dim()
            ):
                self.add("uploads", "index")
                self.add("waits", "index")
            if _is_mask(part) or (on_device and part.dim() == 0):
                self.add("readbacks", "index")
                self.add("waits", "index")

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counted]:
        """Count while the block runs."""
        counter = Counted()
        self._counters.append(counter)
        try:
            yield counter
        finally:
            self._counters.remove(counter)


def _split_if_plain(expansion: Any, weight: torch.Tensor) -> Any:
    """As in the package, which asks for a plain ``Parameter``; a weight of the pretended device is none."""
    return mla._split(expansion, weight) if mla._is_plain_expansion(expansion, weight) else None


def _of_torch_cuda(device: PretendedDevice) -> dict[str, Any]:
    """What ``torch.cuda`` says of the GPU. ``is_available`` stays as it is: transformers would look for more."""

    def wait(*_: Any) -> None:
        device.add("waits", "synchronize")

    def event(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(record=lambda *_: None, synchronize=wait)

    def stream(*_: Any) -> Any:
        queue = {"wait_stream": lambda other: None, "wait_event": lambda event: None}
        return SimpleNamespace(cuda_stream=0, synchronize=wait, **queue)

    properties = SimpleNamespace(name="pretended H100", multi_processor_count=PROPERTIES["multiprocessor_count"])
    return {
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: False,
        "current_stream": stream,
        "Stream": stream,
        "Event": event,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": wait,
        "set_sync_debug_mode": device.set_sync_debug_mode,
    }


class _Functions(TorchFunctionMode):
    """Calls that end before they reach an operator where torch was built without CUDA, and what a GPU does at once."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_cuda(kwargs.get("device")):
            device = kwargs.pop("device")
            if isinstance(args[0], torch.Tensor):
                return _to(func(*args, **kwargs), device)
            return _to(func(*args, **kwargs, device="cpu"), device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            kwargs = {"dtype": args[0].dtype} | kwargs
            return _to(torch.tensor(args[1], **kwargs, device="cpu"), DEVICE)
        if func is torch.Tensor.cuda:
            return _to(args[0], DEVICE)
        if func is torch.Tensor.to and type(args[0]) in (torch.Tensor, torch.nn.Parameter):
            return _to(*args, **kwargs)
        if func is torch.nonzero and isinstance(args[0], OnDevice):
            return args[0].nonzero(**kwargs)
        if func is torch.Tensor.__invert__ and _is_cuda(args[0].device):
            return torch.bitwise_not(args[0])
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        if func is torch.empty and kwargs.get("pin_memory") and not _is_cuda(kwargs.get("device")):
            kwargs.pop("pin_memory")
        if func is scaled_dot_product_attention and all(type(tensor) is OnDevice for tensor in args[:3]):
            self.device.add("operators", "scaled_dot_product_attention")
            with torch._C.DisableTorchFunction(), no_dispatch():
                return OnDevice(func(*_held(args), **_held(kwargs)))
        return func(*args, **kwargs)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``tensor.to(…)``, where one of the devices may be the pretended one."""
    others = [argument for argument in args if isinstance(argument, torch.Tensor)]
    if others:
        device, dtype, non_blocking = others[0].device, others[0].dtype, kwargs.get("non_blocking", False)
    else:
        copy, plain = kwargs.pop("copy", False), {k: v for k, v in kwargs.items() if k != "memory_format"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **plain)
        if copy:
            return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking)
    device = DEVICE if _is_cuda(device) else device
    changed: dict[str, Any] = {}
    if device is not None and device != tensor.device:
        changed |= {"device": device, "non_blocking": non_blocking}
    if dtype is not None and dtype != tensor.dtype:
        changed["dtype"] = dtype
    return torch.ops.aten._to_copy(tensor, **changed) if changed else tensor


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Operators(TorchDispatchMode):
    """Runs the operators of the pretended GPU on the CPU, and counts them."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in (torch.Tensor, torch.nn.Parameter, OnDevice) for kind in types):
            return NotImplemented  # a handle of the package reads its cache first
        kwargs = dict(kwargs or {})
        given = _Given(func, args, kwargs)
        target = kwargs.get("device")
        on_device = _is_cuda(target) if target is not None else bool(given.wrappers)
        if not (given.wrappers or on_device):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        self._count(func, name, given, args, kwargs, on_device)
        if on_device and target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        result = func(*_held(args), **_held(kwargs))
        if name.startswith(("empty", "new_empty")):
            result.zero_()  # no kernel writes to it
        if name == "copy_":
            return args[0]
        if name == "_local_scalar_dense" or not on_device:
            return result
        return _mapped(given.wrap, torch.Tensor, result)

    def _count(
        self, func: Any, name: str, given: _Given, args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool
    ) -> None:
        add = self.device.add
        if name in _COPIES:
            source = args[1] if name == "copy_" else args[0]
            to_device = isinstance(args[0], OnDevice) if name == "copy_" else on_device
            if isinstance(source, OnDevice) != to_device:
                kind, blocking = "uploads" if to_device else "readbacks", not _non_blocking(func, args, kwargs)
                add(kind, name)
                if blocking:
                    add("waits", name)
                return
        elif given.on_host and name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            shapes = [tuple(x.shape) for x in given.on_host]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
                f"{func}: on the CPU are tensors of {shapes}"
            )
        for _ in given.on_host:  # indices that are on the CPU
            add("uploads", name)
            add("waits", name)
        if name in _WAITING or _counts_true(name, args):
            add("readbacks", name)
            add("waits", name)
        if name != "_local_scalar_dense" and not func.is_view and name not in _FREE:
            add("operators", name)


class _Given:
    """The tensors that an operator was given.

    Attributes:
        wrappers: those on the device.
        on_host: those on the CPU that a GPU's kernel cannot take: they have a dimension.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.wrappers: list[OnDevice] = []
        self.on_host: list[torch.Tensor] = []

        self._sort(args)
        self._sort(kwargs.values())
        if not self.wrappers:
            self.on_host.clear()

    def _sort(self, given: Iterable[Any]) -> None:
        for each in given:
            if isinstance(each, OnDevice):
                self.wrappers.append(each)
            elif isinstance(each, torch.Tensor):
                if each.dim():
                    self.on_host.append(each)
            elif isinstance(each, (list, tuple)):
                self._sort(each)

    def wrap(self, result: torch.Tensor) -> torch.Tensor:
        """The result as a tensor of the device: the argument itself where an operator works in place."""
        for wrapper in self.wrappers:
            if result is wrapper.held:
                if result.shape != wrapper.shape or result.stride() != wrapper.stride():
                    raise NotImplementedError(f"{self.func} changes the shape of a tensor of the pretended device")
                return wrapper
        return OnDevice(result)


def current() -> PretendedDevice:
    """The device that is active."""
    if not _ACTIVE:
        raise RuntimeError("a tensor of the pretended device is used outside of it")
    return _ACTIVE[-1]


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_number(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dim() == 0 and part.dtype not in (torch.bool, torch.uint8)


def _held(given: Any) -> Any:
    return _mapped(lambda tensor: tensor.held, OnDevice, given)


def _mapped(function: Callable[[Any], Any], kind: type, given: Any) -> Any:
    """``function`` of each tensor of that kind in lists, tuples and dictionaries of what operators take and give."""
    if isinstance(given, kind):
        return function(given)
    if isinstance(given, (list, tuple)):
        mapped = [_mapped(function, kind, each) for each in given]
        return mapped if isinstance(given, list) else tuple(mapped)
    if isinstance(given, dict):
        return {name: _mapped(function, kind, each) for name, each in given.items()}
    return given


def _held_index(part: Any) -> Any:
    """A part of an index; the ends of a slice that are on the device are read back."""
    if isinstance(part, slice):
        return slice(*(int(end) if isinstance(end, OnDevice) else end for end in (part.start, part.stop, part.step)))
    return part.held if isinstance(part, OnDevice) else part


def _non_blocking(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))


def _counts_true(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operator has to count the elements of a mask: what it gives has as many, or it takes as many."""
    if name == "index":
        return any(_is_mask(index) for index in args[1])
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if _is_mask(index)]
        filled = len(masks) == 1 and args[2].numel() == 1 and not any(args[3:4])  # torch fills these without counting
        return bool(masks) and not filled
    return False


def _is_mask(index: Any) -> bool:
    return isinstance(index, (torch.Tensor, np.ndarray)) and index.dtype in (torch.bool, torch.uint8, np.bool_)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its parameters and buffers on the pretended device, without their gradient."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                on_device = parameter.detach().to(DEVICE)
                module._parameters[name] = torch.nn.Parameter(on_device, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(DEVICE)
    return model
