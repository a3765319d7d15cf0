"""What the operating system tells about this machine: the only file that reads /proc."""

import os
import platform
import time
from pathlib import Path

import psutil

CPU_INFO = Path("/proc/cpuinfo")
CPU_TIMES = Path("/proc/stat")
OWN_MEMORY = Path("/proc/self/statm")


def usable_cores() -> int:
    """Processors that this process may run on, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def load_average() -> float:
    """Programs running or waiting for a processor, on average over the last minute.

    Includes this very program. 0 where the system keeps no such figure.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def resident_bytes() -> int:
    """Bytes of memory that this process holds at this moment."""
    if OWN_MEMORY.exists():
        return int(OWN_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return psutil.Process().memory_info().rss


def foreign_cpu_seconds() -> float | None:
    """Processor seconds that everything but this process has used since the machine started.

    None where the system doesn't tell.
    """
    if not CPU_TIMES.exists():
        return None
    # In ticks: user, nice, system, idle, waiting for disks, interrupts (two), stolen by the host.
    user, nice, system, _, _, hard, soft, stolen = map(int, CPU_TIMES.read_text().split()[1:9])
    busy = (user + nice + system + hard + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


class Neighbours:
    """How busy other programs keep this machine, from its construction until `cores` is asked."""

    def __init__(self) -> None:
        self._load = load_average()
        self._used = foreign_cpu_seconds()
        self._since = time.monotonic()

    def cores(self) -> float:
        """Processors that other programs kept busy meanwhile, on average.

        Where the system doesn't tell, the load average from before stands in, which includes what
        this program itself did in the minute before.
        """
        now = foreign_cpu_seconds()
        elapsed = time.monotonic() - self._since
        if self._used is None or now is None or elapsed <= 0:
            return self._load
        return max(0.0, (now - self._used) / elapsed)
