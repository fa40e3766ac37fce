"""hgpt/run/energy.py: what codecarbon may do, the arithmetic over restarts and machines, and runs that measure."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from codecarbon.core.resource_tracker import ResourceTracker
from codecarbon.external import hardware
from codecarbon.external.ram import RAM
from small_run import SEQ_LEN, at_step, make_config, records

import train
from hgpt.errors import UserError
from hgpt.interpret.measures import training
from hgpt.run import energy
from hgpt.run.energy import EnergyMeter, Reading, RunEnergy, check_country, describe, last_record
from hgpt.run.stop import Preempted
from hgpt.runs import find_runs, read_run

GERMANY = {"energy_country": "DEU"}


# -------------------------------------------------------------------------------------------------------- Settings


def test_a_country_that_is_not_known():
    for country, hint in (("DEX", r'"DEU" \(Germany\)'), ("deu", '"DEU"'), ("Germany", "three letters, ISO 3166-1")):
        with pytest.raises(UserError, match=f"log.energy_country = '{country}': .*{hint}"):
            check_country(country)


def test_codecarbon_that_is_not_installed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "find_spec", lambda name: None)
    config = make_config(data, tmp_path, log=GERMANY)
    with pytest.raises(UserError, match=r'log\.energy_country = "DEU" .*pip install "hgpt\[energy\]"'):
        train.main(config)
    assert not config.run_folder.exists()


# ----------------------------------------------------------------------------------------------- codecarbon itself

# Python reports every file that is opened and every address that is looked up or connected to, whoever asks for it.
WATCHED = """
import os, sys, tempfile, time, types

def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        if (event, arguments[1:]) != ("socket.bind", (("::1", 0),)):  # urllib3 asks whether there is IPv6
            print("NETWORK", event, arguments)
    if event in ("os.mkdir", "os.rename", "os.remove", "os.symlink"):
        print("CHANGED", event, arguments)
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if arguments[0] != os.devnull:
            print("WRITTEN", arguments[0])
    if event == "subprocess.Popen":
        print("PROGRAM", os.path.basename(str(arguments[0])))

package = types.ModuleType("hgpt")  # without torch, which takes seconds and looks around as it likes
package.__path__ = [sys.argv[1]]
sys.modules["hgpt"] = package
tempfile.gettempdir()  # Python tries it out with a file, which it removes
sys.addaudithook(watch)
from hgpt.run.energy import EnergyMeter, Reading, check_country
check_country("FRA")
start = time.monotonic()
meter = EnergyMeter("FRA")
began = time.monotonic()
time.sleep(1)
reading = meter.read()
print("SECONDS", time.monotonic() - began, time.monotonic() - start)
meter.stop()
print("METHOD", meter.method)
print("READING", *reading)
"""


def test_nothing_is_sent_or_written_and_the_units_are_right(tmp_path):
    """The settings that would send are all there, in the environment; and power · time is energy · intensity."""
    hostile = """
        EMISSIONS_ENDPOINT=http://127.0.0.1:9/ ELECTRICITYMAPS_API_TOKEN=token CO2_SIGNAL_API_TOKEN=token
        OUTPUT_METHODS=csv,api,prometheus SAVE_TO_API=true API_CALL_INTERVAL=1 ALLOW_MULTIPLE_RUNS=false
        CLOUD_PROVIDER=gcp CLOUD_REGION=us-east1 COUNTRY_ISO_CODE=USA FORCE_CARBON_INTENSITY_G_CO2E_KWH=999 PUE=3
        LOG_LEVEL=debug FORCE_RAM_POWER=36000
    """  # 36 kW of RAM are far above what else is estimated
    hostile = dict(f"CODECARBON_{setting}".split("=") for setting in hostile.split())
    (tmp_path / ".codecarbon.config").write_text("[codecarbon]\nsave_to_file = true\noutput_dir = /tmp\n")
    place = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCHED, str(Path(train.__file__).parent / "hgpt")]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | hostile | place, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    said = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    kinds = dict(said)
    assert kinds.keys() <= {"PROGRAM", "SECONDS", "METHOD", "READING"}, result.stdout
    programs = {rest for kind, rest in said if kind == "PROGRAM"}
    assert programs <= {"nvidia-smi", "rocm-smi", "lscpu", "uname", "file", "python", Path(sys.executable).name}
    assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]
    assert "RAM taken as 36000 W" in kinds["METHOD"]
    least, most = map(float, kinds["SECONDS"].split())
    reading = Reading(*map(float, kinds["READING"].split()))
    # 36 kW are 0.01 kWh a second.
    assert 0.95 * 0.01 * least < reading.ram_kwh < 1.05 * 0.01 * most
    # France's 56 g CO2eq/kWh of 2023.
    spent = reading.cpu_kwh + reading.gpu_kwh + reading.ram_kwh
    assert reading.emissions_kg == pytest.approx(0.056039 * spent, rel=1e-6)


def test_counters_that_measure(tmp_path, monkeypatch):
    """codecarbon's own code for RAPL and NVML, on counters of ours: 7200 J by the CPU, 3600 J by one GPU of two."""
    package = tmp_path / "intel-rapl" / "intel-rapl:0"
    package.mkdir(parents=True)
    for name, value in (("name", "package-0"), ("energy_uj", "1000000"), ("max_energy_range_uj", "262143328850")):
        (package / name).write_text(value)
    millijoules = [5_000_000, 9_000_000]
    of_a_gpu = {
        **{"HandleByIndex": lambda index: index, "TotalEnergyConsumption": lambda index: millijoules[index]},
        **{"Name": lambda index: "a GPU", "UUID": lambda index: f"GPU-{index}"},
        **{"MemoryInfo": lambda index: SimpleNamespace(total=0), "EnforcedPowerLimit": lambda index: 0},
        **{"Count": lambda: 2, "UtilizationRates": lambda index: SimpleNamespace(gpu=0)},
    }
    nvml = SimpleNamespace(
        **{"NVMLError": OSError, "NVMLError_NotSupported": OSError, "nvmlInit": lambda: None},
        **{f"nvmlDeviceGet{name}": value for name, value in of_a_gpu.items()},
    )
    monkeypatch.setattr("codecarbon.core.gpu_nvidia.pynvml", nvml)
    monkeypatch.setattr("codecarbon.core.gpu.PYNVML_AVAILABLE", True)
    cpu = hardware.CPU(os.devnull, "intel_rapl", "a CPU", 100, rapl_dir=str(tmp_path))
    parts = [RAM(), cpu, hardware.GPU.from_utils(["1"])]

    def set_up(resources):
        resources.tracker._hardware = parts
        resources.tracker._conf["ram_total_size"] = 1.0

    monkeypatch.setattr(ResourceTracker, "set_CPU_GPU_ram_tracking", set_up)
    meter = EnergyMeter("DEU")
    try:
        assert meter.method == (
            f"CPU measured by RAPL, RAM estimated as {RAM().total_power().W:g} W from its size, 1 GPU measured by NVML"
        )
        before = meter.read()
        (package / "energy_uj").write_text(str(1_000_000 + 7_200_000_000))
        millijoules[:] = [6_000_000, 9_000_000 + 3_600_000]
        time.sleep(0.1)
        after = meter.read()
    finally:
        meter.stop()
    assert after.cpu_kwh - before.cpu_kwh == pytest.approx(0.002)
    assert after.gpu_kwh - before.gpu_kwh == pytest.approx(0.001)  # the other GPU is somebody else's
    assert after.emissions_kg / sum(after[:3]) == pytest.approx(0.38095)  # Germany in 2023
    cpu = hardware.CPU(os.devnull, "cpu_load", "a CPU", 65)
    assert describe([cpu]) == "CPU estimated from its load and a rated power of 65 W, no RAM, no GPU"


# ------------------------------------------------------------- Arithmetic, with a tracker that is told what to say


class Tracker:
    """codecarbon's: after the k-th reading 3 k kWh by the CPU, 2 k by GPUs, k by RAM, and k kg."""

    made: ClassVar[list["Tracker"]] = []
    fails_at = math.inf

    def __init__(self, **settings):
        self.output = settings["output_handlers"][0]
        self.country = settings["country_iso_code"]
        self.readings, self.stopped = 0, 0
        self._hardware = []
        Tracker.made.append(self)

    def start(self):
        self.readings = -1  # the meter's own at its start shows 0

    def flush(self):
        self.readings += 1
        k = self.readings
        if k >= Tracker.fails_at:
            try:
                raise OSError("the meter burnt")
            except OSError:
                logging.getLogger("codecarbon").warning("stopping", exc_info=True)
            return None
        self.output.out(
            SimpleNamespace(cpu_energy=3.0 * k, gpu_energy=2.0 * k, ram_energy=1.0 * k, emissions=1.0 * k), None
        )
        return 1.0 * k

    def stop(self):
        self.stopped += 1


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setattr("codecarbon.OfflineEmissionsTracker", Tracker)
    monkeypatch.setattr(Tracker, "made", [])
    monkeypatch.setattr(Tracker, "fails_at", math.inf)
    return Tracker


class OneOf:
    """An engine: this process, and what the others answer when objects are gathered."""

    def __init__(self, *answers: list, local_main: bool = True) -> None:
        self.is_local_main = local_main
        self.answers = list(answers)
        self.sent, self.said = [], []

    def gather_objects(self, mine):
        self.sent.append(mine)
        return [mine, *(self.answers.pop(0) if self.answers else [])]

    def say(self, line):
        self.said.append(line)


def test_tokens_per_joule_and_resuming(tracker):
    with RunEnergy("DEU", OneOf(), tokens=0, before=None) as first:
        assert tracker.made[0].country == "DEU"
        record = first.read(7200)
    # 6 kWh are 21.6 MJ.
    assert record == {
        "energy_kwh": 6.0, "cpu_kwh": 3.0, "gpu_kwh": 2.0, "ram_kwh": 1.0, "emissions_kg": 1.0, "tokens": 7200,
        "tokens_per_joule": pytest.approx(7200 / 21.6e6),
    }  # fmt: skip
    with RunEnergy("DEU", OneOf(), tokens=7200, before=record) as again:
        record = again.read(8000)
        assert (record["energy_kwh"], record["gpu_kwh"], record["emissions_kg"]) == (12.0, 4.0, 2.0)
        assert record["tokens_per_joule"] == pytest.approx(8000 / (12 * 3.6e6))
    # Of a run that measured nothing before, tokens from before do not count.
    with RunEnergy("DEU", OneOf(), tokens=7200, before=None) as late:
        assert late.read(7201)["tokens"] == 1


def test_energy_records_without_numbers_do_not_count(tmp_path):
    """As a damaged metrics.jsonl has them; the total goes on from the record before."""
    good = {"kind": "energy", "step": 2, "tokens": 5, **dict.fromkeys(Reading._fields, 1.0)}
    wrong = [good | {"step": 3, name: value} for name in ("cpu_kwh", "tokens") for value in ("x", None, [1], 10**400)]
    lines = [good, *wrong, {"kind": "energy", "step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_record(tmp_path, 3) == good and last_record(tmp_path, 1) is None


def test_the_sum_over_machines(tracker):
    answers = ["CPU measured by RAPL", None, None], [Reading(), Reading(10.0, 20.0, 30.0, 40.0), Reading()]
    with RunEnergy("DEU", OneOf(*answers), tokens=0, before=None) as run:
        assert run.method == "no CPU, no RAM, no GPU; CPU measured by RAPL"
        record = run.read(100)
    assert record["energy_kwh"] == 66.0 and record["emissions_kg"] == 41.0
    assert record["tokens_per_joule"] == pytest.approx(100 / (66 * 3.6e6))
    # A process that is not its machine's first measures nothing, and adds nothing.
    second = OneOf(*answers, local_main=False)
    with RunEnergy("DEU", second, tokens=0, before=None) as run:
        assert run.read(100)["energy_kwh"] == 60.0
    assert second.sent == [None, Reading()] and len(tracker.made) == 1


def test_a_meter_that_cannot_start_raises_nothing(tracker, monkeypatch):
    monkeypatch.setattr(tracker, "__init__", lambda self, **settings: 1 / 0)
    meter = EnergyMeter("DEU")
    assert meter.read() == meter.read() == "ZeroDivisionError: division by zero"
    assert meter.method == "nothing is measured"
    meter.stop()
    assert logging.getLogger("codecarbon").filters == []


def test_a_warning_while_it_measures_is_shown_once(tracker, capsys):
    logger = logging.getLogger("codecarbon")
    meter = EnergyMeter("DEU")
    for _ in range(3):
        logger.warning("a counter went backwards")
    logger.info("all is well")
    meter.stop()
    assert capsys.readouterr().err == "\nenergy: a counter went backwards\n"


# ------------------------------------------------------------------------------------------------------------ Runs


def spent(config) -> list[tuple[int, float, int]]:
    return [(r["step"], r["energy_kwh"], r["tokens"]) for r in records(config.run_folder, "energy")]


def test_a_run_that_really_measures(data, tmp_path, capsys):
    config = make_config(data, tmp_path, log={**GERMANY, "trackers": ("tensorboard",)})
    start = time.time()
    train.main(config)
    lines = records(config.run_folder, "energy")
    assert [line["step"] for line in lines] == [0, 3, 6]
    last = lines[-1]
    assert 0 < lines[0]["energy_kwh"] <= lines[1]["energy_kwh"] <= last["energy_kwh"]  # a reading may be 50 ms old
    assert 1 < 3.6e6 * last["energy_kwh"] / (time.time() - start) < 20_000  # W
    assert last["tokens"] == 6 * 8 * SEQ_LEN
    out = capsys.readouterr().out
    assert out.count(f"energy: {last['method']}\n") == 1 and "CPU " in last["method"]
    assert f"energy {last['energy_kwh']:.3g} kWh ({last['method']})" in out
    assert {path.name for path in config.run_folder.iterdir()} == {
        ".lock", "config.toml", "metrics.jsonl", "tensorboard", "checkpoints", "latest",
    }  # fmt: skip
    # It is read back.
    (name, folder), *_ = find_runs(tmp_path)
    assert read_run(name, folder, time.time()).energy_kwh == last["energy_kwh"]
    model = SimpleNamespace(found={"training": [last]})
    rows = {quantity.label: quantity.value(model) for quantity in training.QUANTITIES}
    assert rows["energy of the training, kWh"] == f"{last['energy_kwh']:.3g}"


def test_a_resumed_run_goes_on_counting(data, tmp_path, tracker):
    config = make_config(data, tmp_path, resume="auto", log=GERMANY, checkpoint={"every": 2})
    train.main(config)
    per_step = 8 * SEQ_LEN
    # Evaluations of the steps 0, 3 and 6 and checkpoints of 2, 4 and 6, in one line where both are.
    whole = [(step, 6.0 * k, step * per_step) for k, step in enumerate((0, 2, 3, 4, 6), start=1)]
    assert spent(config) == whole
    shutil.rmtree(config.run_folder / "checkpoints" / "step_0000006")  # killed while it wrote that
    assert last_record(config.run_folder, 5)["step"] == 4
    train.main(config)
    assert spent(config) == [*whole[:4], (6, whole[3][1] + 6.0, 6 * per_step)]
    # A branch has spent what led to its checkpoint.
    branch = make_config(
        data, tmp_path, name="branch", log=GERMANY, resume=f"{config.run_folder}/checkpoints/step_0000002"
    )
    train.main(branch)
    assert spent(branch)[0] == (3, whole[1][1] + 6.0, 3 * per_step)
    assert [made.stopped for made in tracker.made] == [1, 1, 1]


def test_the_tracker_is_stopped_whatever_ends_a_run(data, tmp_path, tracker, monkeypatch):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    config = make_config(data, tmp_path, log=GERMANY)
    with pytest.raises(Preempted, match="after step 4"):
        train.main(config)
    assert [made.stopped for made in tracker.made] == [1]
    assert [step for step, *_ in spent(config)] == [0, 3, 4]


def test_a_run_outlives_its_meter(data, tmp_path, tracker, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "fails_at", 2)
    config = make_config(data, tmp_path, log=GERMANY)
    train.main(config)
    assert [r["step"] for r in records(config.run_folder, "eval")] == [0, 3, 6]
    assert [step for step, *_ in spent(config)] == [0] and tracker.made[0].stopped == 1
    out = capsys.readouterr().out
    assert out.count("the meter burnt") == out.count("(process 0: OSError: the meter burnt)") == 1
