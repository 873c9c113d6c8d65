"""Try the device before anything is reserved: one forward and one backward of the adapted model on public tokens.

A GPU's kernels are compiled at their first use, which needs a C compiler, Python's headers, a cache that can be
written and may hold programs, and a driver that fits. A site tries all of it before it says that it is ready, so that
a round, which pays, is never the first to find out.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

import torch

from fl_client.dp.adapt import adapt, remove
from fl_client.dp.checks import check_layers
from fl_client.dp.engine import is_out_of_memory, precision_of
from fl_client.model.layout import target_groups
from fl_client.model.load import LoadedModel
from fl_client.tasks.classification import CrossEntropy
from fl_shared.documents.spec import LoraSection
from fl_shared.errors import ConcordatError, ConfigError

COMPILER = "install gcc and Python's headers (Debian: apt install gcc python3-dev), or name a compiler in CC"
CACHE = "set TRITON_CACHE_DIR to a directory that this user alone may write, with room, and not mounted noexec"
DRIVER = "compare `nvidia-smi` with torch.version.cuda: install a driver or a torch build that fits this GPU"
_CLASSES = 2


def try_device(model: LoadedModel) -> str:
    """Adapt every group of layers that the model has, hold its gradients against the batch-size-1 loop, undo it.

    Returns:
        What was tried, for a person: device, type, seconds.

    Raises:
        ConfigError: compiler, cache, driver or memory of the device are not as they must be.
        EngineError: this model cannot be trained privately.
    """
    started = time.perf_counter()
    _private_cache()
    try:
        lora = LoraSection(rank=8, alpha=16.0, targets=target_groups(model.module))
        adapted = adapt(model.module, lora, CrossEntropy(_CLASSES), model.feature_mean, model.feature_std)
        precision = str(precision_of(adapted)).removeprefix("torch.")
        check_layers(adapted, vocabulary=model.tokenizer.vocab_size)
    except ConcordatError:
        raise
    except Exception as error:  # whatever compiler, driver or library raises becomes a line with its fix
        raise explain(error, model.device) from error
    finally:
        remove(model.module)
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    seconds = time.perf_counter() - started
    return f"{name}, {precision}: forward and backward on public tokens in {seconds:.1f} s{_slower(model.device)}"


def _private_cache() -> None:
    """Compiled kernels are programs that this process loads: nobody else may have put them there."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton")
    if cache.is_dir() and cache.stat().st_mode & 0o022:
        raise ConfigError(f"others may write to {cache}, where kernels are kept", fix=f"chmod 700 {quote(str(cache))}")


def _slower(device: torch.device) -> str:
    """Why this device is slower than the machine could be; "" when nothing is known."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "; without Triton, so the quantised products are slow: pip install triton"
    if device.type == "cpu" and not torch.cuda.is_available() and Path("/dev/nvidiactl").exists():
        return f"; torch cannot use this machine's NVIDIA GPU: {DRIVER}"
    return ""


def explain(error: BaseException, device: torch.device) -> ConfigError:
    """What failed on the device, with the next step. No private data has been near it: the words may be shown."""
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    text = f"{words} {error}".lower()
    cache = os.environ.get("TRITON_CACHE_DIR", "~/.triton")
    if is_out_of_memory(error):
        return ConfigError(
            f"the model and a step on a few tokens do not fit into the memory of {device}",
            fix="use a smaller base, int4, a larger GPU, or end what else uses this one",
        )
    if "c compiler" in text or _failed_compiler(error):
        return ConfigError(f"the kernels of {device} cannot be built: {words}", fix=COMPILER)
    if "failed to map segment" in text or (isinstance(error, OSError) and "cuda" not in text):
        return ConfigError(f"the kernels of {device} cannot be kept in {cache}: {words}", fix=CACHE)
    if any(word in text for word in ("driver", "no kernel image", "cuda", "ptxas", "nvidia")):
        return ConfigError(f"{device} does not compute: {words}", fix=DRIVER)
    return ConfigError(
        f"one forward and one backward failed on {device}: {words}",
        fix='write device = "cpu" in [model] to work without the GPU, and report this'
        if device.type == "cuda"
        else "check the model directory with `fl-model inspect`, and report this",
    )


def _failed_compiler(error: BaseException) -> bool:
    """Whether a compiler ended with an error or is not there, whatever its name; ptxas belongs to the driver's side."""
    command = getattr(error, "cmd", None)
    if command is not None:
        return "ptxas" not in str(command)
    compiler = os.environ.get("CC")
    return isinstance(error, FileNotFoundError | PermissionError) and error.filename in ({compiler} if compiler else ())
