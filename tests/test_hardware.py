"""hgpt/hardware.py: no figure rather than a wrong one."""

import importlib.metadata
import tomllib
from pathlib import Path

import psutil
import pytest
import torch

from hgpt import hardware
from hgpt.hardware import Device, device_name, installed_versions, known_device, memory_in_use, peak_flops


@pytest.mark.parametrize(
    ("name", "figures"),  # TFLOP/s, GiB, GB/s
    [
        ("NVIDIA A100-SXM4-80GB", (312, 79, 1935)),
        ("NVIDIA A100-PCIE-40GB", (312, 39, 1555)),
        ("NVIDIA A100", (312, None, None)),  # comes in two sizes
        ("NVIDIA H100 80GB HBM3", (989, 79, 3350)),
        ("NVIDIA H100 PCIe", (756, 79, 2000)),
        ("NVIDIA H200 NVL", (835, 139, 4800)),
        ("NVIDIA GH200 480GB", (989, 94, 4000)),  # the 480 GB are the host's
        ("NVIDIA L40S", (362, 44, 864)),
        ("NVIDIA A10G", (70, 22, 600)),
        ("AMD Instinct MI250X", (191.5, 63, 1638)),  # one of two dies
    ],
)
def test_known_devices(name, figures):
    teraflops, gib, gigabytes = figures
    assert known_device(name) == Device(teraflops * 1e12, gib, None if gigabytes is None else gigabytes * 1e9)
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "Tesla T4", "NVIDIA L40", "NVIDIA A1000", "NVIDIA RTX A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GB200", "NVIDIA H20", "AMD Instinct MI250X/MI250", "AMD Instinct MI300A",
        "cpu", "",
    ],
)  # fmt: skip
def test_unknown_devices_and_those_near_a_name_that_is_known(name):
    assert known_device(name) is None and peak_flops(name) is None


def test_memory_of_a_process_on_the_cpu():
    assert device_name(torch.device("cpu")) == "cpu"
    most, now = memory_in_use(torch.device("cpu")), psutil.Process().memory_info().rss / 2**30
    block = torch.ones(int((most - now + 0.25) * 2**28))  # a quarter of a GiB more than there ever was
    assert memory_in_use(torch.device("cpu")) == pytest.approx(most + 0.25, abs=0.05) and block.sum() > 0
    assert most > 0.05


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_names_and_memory_of_any_accelerator(kind, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 3 * 2**29)
    assert memory_in_use(torch.device(kind)) == 1.5
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 0)  # as for a device without counters
    assert memory_in_use(torch.device(kind)) == memory_in_use(torch.device("cpu"))
    if kind == "mps":  # has no function for its name
        assert device_name(torch.device(kind)) == "mps"
    else:
        monkeypatch.setattr(torch.get_device_module(kind), "get_device_name", lambda device: f"a name of {device}")
        assert device_name(torch.device(kind)) == f"a name of {kind}"


def test_versions_in_a_checkout_that_is_not_installed(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(hardware, "version", missing)
    assert installed_versions("hgpt", "numpy") == {"hgpt": project["version"], "numpy": "not installed"}
    assert hardware._own_version(tmp_path / "pyproject.toml") == "unknown"  # the package alone on the path
    monkeypatch.undo()
    assert installed_versions("psutil") == {"psutil": psutil.__version__}
