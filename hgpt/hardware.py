"""Devices, their peak FLOP/s, memory and bandwidth, and versions of packages."""

import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from hgpt.errors import UserError, first_line

with suppress(ImportError):  # Windows has none
    import resource


class Device(NamedTuple):
    """Data-sheet figures of a GPU; None if the name fits several models."""

    peak_flops: float  # bf16, dense: without sparsity
    memory_gib: int | None  # as CUDA reports it, rounded down
    bandwidth: float | None  # of the memory, bytes/s


# Words of the device's name: (TFLOP/s, GiB, GB/s). The first entry whose words are all in the name is used.
_DEVICES: dict[str, tuple[float, int | None, int | None]] = {
    "H100 PCIe": (756, 79, 2000),
    "H100 NVL": (835, 93, 3900),
    "H100": (989, 79, 3350),
    "H200 NVL": (835, 139, 4800),
    "H200": (989, 139, 4800),
    "GH200": (989, 94, 4000),
    "A100 80GB": (312, 79, 1935),
    "A100 40GB": (312, 39, 1555),
    "A100": (312, None, None),
    "L40S": (362, 44, 864),
    "L4": (121, 22, 300),
    "A10G": (70, 22, 600),
    "A10": (125, 22, 600),
    "RTX 4090": (165, 23, 1008),
    "RTX 3090": (71, 23, 936),
    "B200": (2250, 178, 8000),
    "Instinct MI300X": (1307, 191, 5300),
    "Instinct MI250X": (191.5, 63, 1638),  # one of its two dies, which is a device of its own
}
# Names with these words are other devices: a slice of a GPU (MIG), or a variant of a GPU above.
_OTHER_DEVICE = {"MIG", "Laptop", "Ti", "D"}


def known_device(name: str) -> Device | None:
    """The figures of a device by its name as CUDA reports it ("NVIDIA H100 80GB HBM3"), None if they are unknown."""
    words = set(name.replace("-", " ").split())
    if words & _OTHER_DEVICE:
        return None
    for entry, (teraflops, gib, gigabytes) in _DEVICES.items():
        if words.issuperset(entry.split()):
            return Device(teraflops * 1e12, gib, None if gigabytes is None else gigabytes * 1e9)
    return None


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, None if unknown."""
    device = known_device(name)
    return None if device is None else device.peak_flops


def device_name(device: torch.device) -> str:
    """The driver's name of a GPU (CUDA, ROCm, XPU); for other devices their type, such as "cpu" and "mps"."""
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name_of is None else name_of(device)


def memory_in_use(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on its GPU, or resident if the device's allocator has no count."""
    if device.type != "cpu" and (peak := torch.accelerator.max_memory_allocated(device)):
        return peak / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def choose_device(name: str | None) -> torch.device:
    """The device `name`; None: a GPU if there is one, else the CPU. Raises UserError if it cannot be used."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        return torch.empty(1, device=name).device  # torch.device(name) also accepts a missing device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out; on a CPU torch raises RuntimeError for it, NumPy MemoryError."""
    words = r"out of memory|not enough memory|(can't|cannot) allocate memory|bad_alloc"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(words, str(error), re.I) is not None


@contextmanager
def enough_memory(device: torch.device, way_out: str) -> Iterator[None]:
    """Turn the error of a device that runs out of memory in the block into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{device} ran out of memory: {way_out}") from error


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of packages, or "not installed".

    If hgpt runs from a checkout, its version is that of pyproject.toml, or "unknown".
    """
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = _own_version() if name == "hgpt" else "not installed"
    return found


def _own_version(project: Path = Path(__file__).parents[1] / "pyproject.toml") -> str:
    try:
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, ValueError, KeyError):
        return "unknown"
