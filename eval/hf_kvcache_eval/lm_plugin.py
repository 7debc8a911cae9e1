"""Make plain ``lm_eval --model hf-kvcache`` work: lm-eval has no way of its own to find models of other packages.

:func:`install` writes a ``.pth`` file, which Python reads at every start in this environment. It calls :func:`hook`,
which imports nothing: the model's name is registered when, and only if, ``lm_eval.models`` is imported.
"""

# Imported at every start of Python once it is installed: only what Python has loaded by then, hence no `typing` either.
from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder

_MODULE = "lm_eval.models"
_NAME = "hf-kvcache"
_TARGET = "hf_kvcache_eval.lm:KVCacheLM"
#: .pth files run in alphabetical order, and an editable install puts this package on the path by one of its own.
_FILE = "zz_hf_kvcache_lm_eval.pth"
# Without the try, a package that was uninstalled before its plugin would complain at every start of Python.
_LINE = r'import sys; exec("try:\n    import hf_kvcache_eval.lm_plugin as p; p.hook()\nexcept ImportError:\n    pass")'


class _Finder:
    """Finds ``lm_eval.models`` where Python finds it, and registers the model once it has been executed."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: object) -> None:
                execute(module)  # type: ignore[arg-type]
                register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def hook() -> None:
    """Register the model as soon as ``lm_eval.models`` is imported."""
    if _MODULE in sys.modules:
        register()
    elif _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def register() -> None:
    """Tell lm-eval the model's name; the model itself is imported when it is asked for."""
    from lm_eval.api.registry import model_registry

    if _NAME not in model_registry:
        model_registry.register(_NAME, target=_TARGET)


def install(site: str | None = None) -> str:
    """Write the ``.pth`` file.

    Args:
        site: the folder to write it to; this environment's site-packages if None.

    Returns:
        What was done, in words.

    Raises:
        OSError: if the folder cannot be written to.
    """
    path = _path(site)
    with open(path, "w", encoding="utf-8") as file:
        file.write(_LINE + "\n")
    return f"installed: lm_eval --model {_NAME} now works in this environment ({path})"


def uninstall(site: str | None = None) -> str:
    """Remove what :func:`install` wrote; returns what was done, in words."""
    import os

    path = _path(site)
    if not os.path.exists(path):
        return f"not installed: no {path}"
    os.remove(path)
    return f"removed {path}"


def _path(site: str | None) -> str:
    import os
    import sysconfig

    return os.path.join(site or sysconfig.get_path("purelib"), _FILE)
