"""The machine that something was measured on. No names of hosts, users or folders."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import psutil

BUSY_SECONDS = 0.5
"""How long to look at what other programs do."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the software on it."""

    chip: str
    """As the system names it, such as "Apple M3 Max"."""
    cores: int
    """Logical cores."""
    busy: float
    """Share of the processor that other programs used just before the check began."""
    memory_bytes: int
    """The machine's memory."""
    available_bytes: int
    """Of it, what programs could have when the check began."""
    working_set_bytes: int | None
    """What Metal recommends to stay under; None without Metal."""
    system: str
    """Operating system and its version."""
    backend: str
    """Where MLX computes: "Metal", "CPU", or whatever else MLX calls its device."""
    versions: dict[str, str]
    """Python, MLX, mlx-lm and moelab."""
    date: str
    """When the check began, UTC, ISO 8601."""

    @property
    def was_busy(self) -> bool:
        """Whether other programs had so much of the processor that speeds mean little."""
        return self.busy >= 0.2


def this_machine() -> Machine:
    """Returns a description of the machine that this runs on."""
    busy = psutil.cpu_percent(interval=BUSY_SECONDS) / 100
    memory = psutil.virtual_memory()
    info = mx.device_info()
    working_set = info.get("max_recommended_working_set_size")
    return Machine(
        chip=chip(),
        cores=psutil.cpu_count() or 1,
        busy=busy,
        memory_bytes=int(memory.total),
        available_bytes=int(memory.available),
        working_set_bytes=int(working_set) if working_set else None,
        system=system(),
        backend=backend(),
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def versions(*more: str) -> dict[str, str]:
    """Returns the versions of Python, MLX, mlx-lm, moelab and `more` packages."""
    names = ("mlx", "mlx-lm", "moelab", *more)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def backend() -> str:
    """Returns where MLX computes: "Metal", "CPU", or whatever else MLX calls its device."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return "Metal" if mx.metal.is_available() else str(mx.default_device())


def chip() -> str:
    """Returns the processor's name as the system gives it, such as "Apple M3 Max"."""
    return _chip_name() or str(mx.device_info().get("device_name") or platform.machine())


def _chip_name() -> str | None:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() or None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def system() -> str:
    """Returns the operating system and its version."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} ({platform.machine()})"
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{name}, kernel {kernel} ({platform.machine()})"
