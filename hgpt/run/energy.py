"""Energy and emissions of a run, by the offline tracker of codecarbon (pip install "hgpt[energy]").

    energy_kwh = CPU + GPUs + RAM of every machine, from the first evaluation on         1 kWh = 3.6·10⁶ J
    emissions_kg = Σ energy · carbon intensity of the country's electricity               kg CO2eq
    tokens_per_joule = training tokens while energy was measured / (3.6·10⁶ energy_kwh)

The accuracy depends on the machine; `method` says what was measured and what was estimated. Counters measure GPUs
(NVML, AMDSMI) and, on Linux if /sys/class/powercap is readable, the CPU's package (RAPL). Otherwise the CPU is
estimated from its load, as P (0.1 + 0.9 load³), where P is its rated power if codecarbon knows the model, else 4 W a
core. RAM is always estimated, from its size. CODECARBON_FORCE_CPU_POWER sets P and CODECARBON_FORCE_RAM_POWER the
power of RAM, in watts. Estimates may be wrong by a factor: use them to compare runs on one machine, not machines.

One process of each node measures the whole machine, with every process on it, but only the GPUs in
CUDA_VISIBLE_DEVICES. Nothing is sent over the network, and only the run's metrics are written.
"""

import difflib
import logging
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from hgpt.errors import UserError
from hgpt.history import number_in, records

if TYPE_CHECKING:  # EnergyMeter is used without torch
    from hgpt.run.engines import Engine

JOULES_PER_KWH = 3.6e6


class Reading(NamedTuple):
    """Energy in kWh and emissions in kg CO2eq since a measurement began."""

    cpu_kwh: float = 0.0
    gpu_kwh: float = 0.0
    ram_kwh: float = 0.0
    emissions_kg: float = 0.0


def check_country(country: str | None, setting: str = "log.energy_country") -> None:
    """Check the value of `setting` before the run starts; None: no energy is measured.

    Raises UserError if codecarbon is not installed or does not know the country (ISO 3166-1 alpha-3).
    """
    if country is None:
        return
    if find_spec("codecarbon") is None:
        raise UserError(
            f'{setting} = "{country}" needs codecarbon, which is not installed: pip install "hgpt[energy]", '
            f"or remove {setting}"
        )
    from codecarbon.input import DataSource

    known = DataSource().get_global_energy_mix_data()
    if country not in known:  # codecarbon would take the world's average
        near = difflib.get_close_matches(country.upper(), known)
        close = [f'"{code}" ({known[code]["country_name"]})' for code in near]
        raise UserError(
            f"{setting} = {country!r}: codecarbon knows no carbon intensity of that country's electricity"
            + (f"; did you mean {' or '.join(close)}?" if close else "; it takes three letters, ISO 3166-1 alpha-3")
        )


class EnergyMeter:
    """Measures this machine from construction to `stop`. It raises nothing, so that a failure does not end the run.

    Attributes:
        method: how each part of the machine is measured or estimated, for a reader.
    """

    def __init__(self, country: str) -> None:
        self.method = "nothing is measured"
        self._failure: str | None = None
        self._tracker: Any = None
        self._latest: Any = None
        self._started = False
        self._cause: BaseException | None = None  # codecarbon logs exceptions in place of raising them
        self._said: set[tuple[str, int]] = set()
        logging.getLogger("codecarbon").addFilter(self._filter_log)
        try:
            self._start(country)
        except Exception as error:
            self._fail(error)
        self._started = True

    def _start(self, country: str) -> None:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output_methods.base_output import BaseOutput

        meter = self

        class Output(BaseOutput):
            def out(self, total: Any, delta: Any) -> None:
                meter._latest = total

        # codecarbon takes other arguments from ~/.codecarbon.config and the environment. Given here: every
        # argument that makes it send, write or replace the country.
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            region=None,
            cloud_provider=None,
            cloud_region=None,
            country_2letter_iso_code=None,
            force_carbon_intensity_g_co2e_kwh=None,
            electricitymaps_api_token="",  # with None codecarbon reads the token's older name
            emissions_endpoint=None,
            output_methods=[],
            output_handlers=[Output()],
            output_dir=os.devnull,  # must exist; nothing can be written there
            allow_multiple_runs=True,  # otherwise it writes a lock file and replaces our handlers of SIGINT and SIGTERM
            api_call_interval=-1,
            measure_power_secs=15,  # RAPL's counters wrap around after minutes
            tracking_mode="machine",
            gpu_ids=None,
            force_mode_cpu_load=False,
            rapl_include_dram=False,  # RAM is estimated already
            rapl_prefer_psys=False,
            pue=1.0,
            wue=0.0,
            log_level="warning",
        )
        self._tracker.start()
        if isinstance(self.read(), Reading):
            self.method = describe(self._tracker._hardware)

    def read(self) -> Reading | str:
        """The energy since the start; after a failure, the error's description."""
        if self._failure is None:
            try:
                # Returns the emissions, or None after an exception that it has logged.
                if self._tracker.flush() is None:
                    raise self._cause or RuntimeError("codecarbon does not say why")
                total = self._latest
                return Reading(total.cpu_energy, total.gpu_energy, total.ram_energy, total.emissions)
            except Exception as error:
                self._fail(error)
        return self._failure or ""

    def stop(self) -> None:
        """End the measurement; may be called again."""
        try:
            if self._tracker is not None:
                self._tracker.stop()
        except Exception as error:
            self._fail(error)
        self._tracker = None
        logging.getLogger("codecarbon").removeFilter(self._filter_log)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or f"{type(error).__name__}: {error}"

    def _filter_log(self, record: logging.LogRecord) -> bool:
        """Print each warning of codecarbon once, instead of its log; `method` covers warnings at the start.

        A logging filter, because codecarbon replaces its logger's handlers.
        """
        if record.exc_info:
            self._cause = record.exc_info[1]
        place = (record.pathname, record.lineno)
        measuring = self._started and self._failure is None
        swallowed = record.module == "util"  # logged by codecarbon's `suppress`, with an exception that `read` reports
        if measuring and record.levelno >= logging.WARNING and not swallowed and place not in self._said:
            self._said.add(place)
            print(f"\nenergy: {record.getMessage()}", file=sys.stderr)
        return False


def describe(hardware: list[Any]) -> str:
    """How codecarbon measures or estimates CPU, RAM and GPUs: "CPU measured by RAPL, RAM estimated ..."."""
    meters = {"intel_rapl": "RAPL", "windows_emi": "EMI", "intel_power_gadget": "Power Gadget"}
    meters |= {"NvidiaGPUDevice": "NVML", "AMDGPUDevice": "AMDSMI"}
    found = {}
    for part in hardware:
        kind = type(part).__name__
        if kind == "CPU" and part._mode in meters:
            found["CPU"] = f"CPU measured by {meters[part._mode]}"
        elif kind == "CPU":
            how = "from its load and" if part._mode == "cpu_load" else "as half of"
            found["CPU"] = f"CPU estimated {how} a rated power of {part._tdp:g} W"
        elif kind == "RAM" and part._force_ram_power is not None:
            found["RAM"] = f"RAM taken as {part._force_ram_power:g} W"
        elif kind == "RAM":
            found["RAM"] = f"RAM estimated as {part.total_power().W:g} W from its size"
        elif kind == "GPU":
            names = {meters.get(type(device).__name__, type(device).__name__) for device in part.devices.devices}
            found["GPU"] = f"{len(part._get_gpu_ids())} GPU measured by {' and '.join(sorted(names))}"
        else:  # an Apple chip or a Raspberry Pi, which have meters
            found[part.chip_part] = f"{part.chip_part} measured by {kind}"
    return ", ".join(found.get(name, f"no {name}") for name in ("CPU", "RAM", "GPU"))


class RunEnergy:
    """Energy and emissions of a run on all of its machines, cumulative over restarts; measures while it is open.

    Args:
        country: ISO 3166-1 alpha-3.
        engine: one process of each machine measures.
        tokens: training tokens of the run so far.
        before: the energy record of the resumed checkpoint (`last_record`), to which the new energy is added.

    Attributes:
        method: how energy is measured, for a reader; the distinct methods of several machines, joined by "; ".
    """

    def __init__(self, country: str, engine: "Engine", *, tokens: int, before: Mapping[str, Any] | None) -> None:
        before = {} if before is None else before
        self._country, self._engine = country, engine
        self._before = Reading(*(before.get(name, 0.0) for name in Reading._fields))
        self._tokens = before.get("tokens", 0) - tokens
        self._meter: EnergyMeter | None = None
        self._failed = False

    def __enter__(self) -> Self:
        """Collective."""
        if self._engine.is_local_main:
            self._meter = EnergyMeter(self._country)
        try:
            methods = self._engine.gather_objects(self._meter and self._meter.method)
        except BaseException:
            self.__exit__()  # the meter's thread would keep the process alive
            raise
        self.method = "; ".join(dict.fromkeys(method for method in methods if method))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._meter is not None:
            self._meter.stop()

    def read(self, tokens: int) -> dict[str, float] | None:
        """Energy of the run after `tokens` training tokens; keys and units as in metrics.jsonl. Collective.

        None once the measurement of any machine has failed, because a sum without it would be too low; this is printed
        once per node.
        """
        if self._failed:
            return None
        found = self._engine.gather_objects(Reading() if self._meter is None else self._meter.read())
        faults = [f"process {rank}: {reading}" for rank, reading in enumerate(found) if isinstance(reading, str)]
        if faults:
            self._failed = True
            self._engine.say(f"energy can no longer be measured and is not logged from here on ({faults[0]})")
            return None
        spent = Reading(*map(sum, zip(self._before, *found, strict=True)))
        energy, tokens = spent.cpu_kwh + spent.gpu_kwh + spent.ram_kwh, self._tokens + tokens
        return {
            "energy_kwh": energy,
            **spent._asdict(),
            "tokens": tokens,
            "tokens_per_joule": tokens / (JOULES_PER_KWH * energy) if energy > 0 else float("nan"),
        }


def last_record(run_folder: Path, step: int) -> dict[str, Any] | None:
    """The last energy record at or before `step` in a run's metrics.jsonl; None if there is none.

    Records without the numbers that a total needs, as in a damaged file, do not count.
    """
    needed = (*Reading._fields, "tokens")
    for record in reversed(records(run_folder, "energy")):
        if record["step"] <= step and None not in [number_in(record, name) for name in needed]:
            return record
    return None


def in_words(record: Mapping[str, float], method: str) -> str:
    """A result of `RunEnergy.read` as one line for a reader."""
    return (
        f"energy {record['energy_kwh']:.3g} kWh ({method}), {record['emissions_kg']:.3g} kg CO2eq, "
        f"{record['tokens_per_joule']:.3g} tokens per joule"
    )
