"""Runs the tests of the CPU kernels with the kernels of another processor, under QEMU's user-mode emulation.

    python -m tests.kernels.emulated.run [--cpu neoverse-n1] [pytest arguments]

Only the kernels are emulated. Python and torch run natively, and load in place of the kernels a library that has each
call made in an emulated process, on the memory of the tests (``client.cpp``, ``server.cpp``). So the same tests run as
on x86-64, with the same structs. What has to be installed: a cross compiler and the emulator, on Debian
``g++-aarch64-linux-gnu`` and ``qemu-user``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_kvcache.kernels.cpu.build import SOURCES, find_compiler

HERE = Path(__file__).resolve().parent
BUILD = SOURCES.parent / "build.py"
CROSS, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
#: An emulated processor for each instruction set: with neither dot products nor matrix products of bytes, with the
#: first, with both.
CPUS = {"cortex-a57": "portable", "neoverse-n1": "neon-dotprod", "max": "neon-i8mm"}
#: The last one runs every test with all three sets; the others show that their kernels have no instruction too many.
TESTS = {cpu: ["tests/kernels/cpu/test_attend.py", "tests/kernels/cpu/test_packing.py"] for cpu in CPUS}
TESTS["max"] = ["tests/kernels/cpu"]


def functions() -> list[str]:
    """The functions of ``api.h`` in their order; those that return a string have a ``*`` before their names."""
    text = (SOURCES / "api.h").read_text()
    found = re.findall(r"^(int32_t|void|const char\*) (hfkv_\w+)\(", text, re.MULTILINE)
    return [("*" if kind.startswith("const") else "") + name for kind, name in found]


def build(folder: Path) -> Path:
    """Compile the emulated kernels, the server and the client; returns the client's library."""
    kernels = folder / "libemulated.so"
    subprocess.run([sys.executable, BUILD, kernels], env=os.environ | {"CXX": CROSS}, check=True)
    # The library finds its OpenMP in the process, as it does beside torch.
    openmp = ["-fopenmp", "-Wl,--no-as-needed"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-pthread"]
    server = [HERE / "server.cpp", "-rdynamic", "-o", folder / "server", "-ldl"]
    subprocess.run([CROSS, *flags, *openmp, *server], check=True)
    lines = [
        f"TEXT_FUNCTION({index}, {name[1:]})" if name.startswith("*") else f"FUNCTION({index}, {name})"
        for index, name in enumerate(functions())
    ]
    (folder / "functions.inc").write_text("\n".join(lines) + "\n")
    client = folder / "libhf_kvcache.so"
    command = [find_compiler(), *flags, "-fPIC", "-shared", f"-I{folder}", HERE / "client.cpp", "-o", client]
    subprocess.run(command, check=True)
    return client


def run(folder: Path, client: Path, cpu: str, arguments: list[str]) -> int:
    """Run pytest with the kernels on one emulated processor; returns its exit status."""
    start = folder / f"start-{cpu}"
    names = " ".join(f"'{name}'" for name in functions())
    emulator = f"exec {EMULATOR} -cpu {cpu} -L {ROOT} {folder}/server {folder}/libemulated.so"
    start.write_text(f'#!/bin/sh\n{emulator} "$1" {names}\n')
    start.chmod(0o755)
    environment = os.environ | {
        "HF_KVCACHE_NATIVE_LIBRARY": str(client),
        "HF_KVCACHE_EMULATOR": str(start),
        "OMP_WAIT_POLICY": "passive",  # emulated threads that spin would take the cores from those that compute
    }
    check = f"from hf_kvcache.kernels.cpu import library; assert library.isa() == {CPUS[cpu]!r}, library.isa()"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    print(f"{cpu}: {CPUS[cpu]}", flush=True)
    tests = arguments or ["-m", "not slow", *TESTS[cpu]]
    return subprocess.run([sys.executable, "-m", "pytest", *tests], env=environment).returncode


def main() -> int:
    """Run the tests on each processor; the exit status is 1 if any of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", choices=CPUS, action="append", help="only this emulated processor")
    own, arguments = parser.parse_known_args()
    missing = [name for name in (CROSS, EMULATOR) if not shutil.which(name)]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (on Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        client = build(folder)
        failed = [cpu for cpu in own.cpu or CPUS if run(folder, client, cpu, arguments)]
    print(f"failed on: {', '.join(failed)}" if failed else "passed on every emulated processor")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
