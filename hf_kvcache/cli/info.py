"""The command ``hf-kvcache info``: versions, device, kernels, the names that are registered, and what is slow here."""

from __future__ import annotations

import os
import platform

import torch

from hf_kvcache import codecs, eviction
from hf_kvcache.cli.slow_here import Here
from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.cpu import library
from hf_kvcache.lowrank import methods
from hf_kvcache.sparse import registry as selectors
from hf_kvcache.utils.environment import package_version


def print_info() -> None:
    """Print a line for each."""
    found = {
        name: package_version(name) or "not installed"
        for name in ("hf-kvcache", "torch", "transformers", "accelerate", "triton")
    }
    found |= {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
        "kernels": _kernels(),
        "codecs": ", ".join(codecs.available()),
        "policies": f"{', '.join(eviction.available())}; in front: {', '.join(eviction.wrappers())}",
        "projections": ", ".join(methods.available()),
        "selectors": ", ".join(selectors.available()),
    }
    for name, value in found.items():
        print(f"{name:14}{value}")
    slow = Here.found().reasons()
    print("\nslow here" if slow else "\nslow here: nothing that is known")
    for reason in slow:
        print(f"- {reason}")


def _kernels() -> str:
    """Which kernels run on the CPU and on a GPU, and the reason where these are not the fast ones."""
    forced = os.environ.get(dispatch.VARIABLE)
    if forced:
        return f"{forced} ({dispatch.VARIABLE})"
    missing = dispatch.reason_missing("native", "cpu")
    by = f" ({library.ISA_VARIABLE})" if os.environ.get(library.ISA_VARIABLE) else ""
    on_cpu = f"native, {library.isa()}{by}" if missing is None else f"reference ({missing})"
    missing = dispatch.reason_missing("triton", "cuda")
    return f"cpu: {on_cpu}; cuda: {'triton' if missing is None else f'reference ({missing})'}"
