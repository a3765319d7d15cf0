"""The machine's own limits: how fast it multiplies matrices and moves memory, measured.

No computation can take less time than its arithmetic at the first rate, or its memory traffic at
the second. A timing as a multiple of that floor says how much is left to gain.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pared.bench import host
from pared.bench.timing import synchronize
from pared.errors import InputError

REPEATS = 5
# One product may take this many seconds at most; slow machines multiply smaller matrices.
AFFORDABLE = 1.0
PROBE_SIZE = 256
# Matrices large enough that starting a kernel costs nothing beside computing it, and tensors
# larger than the caches (bytes).
CPU_MATRIX, GPU_MATRIX = 2048, 8192
CPU_TENSOR, GPU_TENSOR = 2**28, 2**30


@dataclass(frozen=True)
class Floor:
    """Measured rates of one device.

    Attributes:
        device: Its name for torch.
        threads: Threads that torch computed with on the CPU.
        flops_per_second: Rate of a large square matrix product, by number format ("float32" ...); a
            multiplication and an addition count as two.
        bytes_per_second: Rate of copying a large tensor, bytes read plus bytes written.
    """

    device: str
    threads: int
    flops_per_second: Mapping[str, float]
    bytes_per_second: float

    def seconds(self, flops: float, bytes: float, dtype: torch.dtype = torch.float32) -> float:
        """The least time that work can take here: arithmetic or memory, whichever needs longer.

        Args:
            flops: Floating-point operations (two for each multiply-add).
            bytes: Bytes read plus bytes written.
            dtype: Number format of the arithmetic.

        Returns:
            Seconds.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops_per_second:
            raise InputError(
                f"no rate was measured for {name} on {self.device}; "
                f"take one of {', '.join(self.flops_per_second)}."
            )
        return max(flops / self.flops_per_second[name], bytes / self.bytes_per_second)


def floor(device: str | torch.device = "cpu") -> Floor:
    """Measures a device's rates, in a few seconds; once per process and number of threads."""
    return _measure(str(device), torch.get_num_threads())


@functools.cache
def _measure(device: str, threads: int) -> Floor:
    dtypes = [torch.float32, torch.bfloat16]
    if torch.device(device).type != "cpu":
        dtypes.append(torch.float16)  # which CPUs only imitate
    rates = {str(dtype).removeprefix("torch."): gemm_rate(dtype, device) for dtype in dtypes}
    return Floor(device, threads, rates, copy_rate(device))


def gemm_rate(
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Best rate of a square matrix product, in FLOP/s."""
    largest = CPU_MATRIX if torch.device(device).type == "cpu" else GPU_MATRIX

    def best(size: int) -> float:
        # A generator of its own: measuring must not move anyone's random numbers.
        generator = torch.Generator(device).manual_seed(0)
        a = torch.randn(size, size, generator=generator, device=device).to(dtype)
        return best_seconds(lambda: a @ a, clock)

    size = affordable_size(best(PROBE_SIZE), largest)
    return 2 * size**3 / best(size)


def copy_rate(
    device: str | torch.device = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Best rate of copying a large tensor, in bytes per second, read plus written."""
    size = CPU_TENSOR if torch.device(device).type == "cpu" else GPU_TENSOR
    # Written to, so that no page of memory is claimed during the copy.
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.zeros_like(source).fill_(2)
    return 2 * size / best_seconds(lambda: copy.copy_(source), clock)


def affordable_size(probe_seconds: float, largest: int) -> int:
    """The largest matrix, halving from `largest`, whose product should take a second at most.

    Args:
        probe_seconds: What the product of matrices of PROBE_SIZE took.
        largest: Rows to begin with.

    Returns:
        Rows of the matrix.
    """
    size = largest
    while size > PROBE_SIZE and probe_seconds * (size / PROBE_SIZE) ** 3 > AFFORDABLE:
        size //= 2
    return size


def best_seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """The shortest of several runs of a call, after one that doesn't count."""
    call()
    durations = []
    for _ in range(REPEATS):
        synchronize()
        start = clock()
        call()
        synchronize()
        durations.append(clock() - start)
    return max(min(durations), 1e-12)


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The machine in words and numbers, ready for JSON, to stand beside every result.

    Args:
        device: Whose rates to measure.

    Returns:
        cpu (model name), cores, threads, torch (version), gpu (name or None), device,
        flops_per_second by number format, and bytes_per_second.
    """
    rates = floor(device)
    ours = torch.device(device) if torch.device(device).type == "cuda" else None
    return {
        "cpu": host.cpu_name(),
        "cores": host.usable_cores(),
        "threads": rates.threads,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(ours) if torch.cuda.is_available() else None,
        "device": rates.device,
        "flops_per_second": dict(rates.flops_per_second),
        "bytes_per_second": rates.bytes_per_second,
    }
