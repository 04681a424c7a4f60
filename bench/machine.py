"""What a figure was measured on, in a line for tables and plots."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from shoal.worker.profile import usable_cores

_CPUINFO = Path("/proc/cpuinfo")


def describe_machine(threads: int) -> str:
    """As `AMD EPYC (avx2), 2 of 2 cores, torch 2.13.0+cpu`."""
    widest = torch.backends.cpu.get_cpu_capability().lower()
    return (
        f"{_processor()} ({widest}), {threads} of {usable_cores()} cores, torch {torch.__version__}"
    )


def _processor() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()
