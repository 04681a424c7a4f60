"""How much memory Shoal may use on this machine or its accelerator."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

# The rest is for what else lives here: page tables, other programs' growth, our own buffers.
_USABLE_SHARE = 0.9
_CGROUP = Path("/sys/fs/cgroup")


def usable_memory_bytes(device: str = "cpu") -> int:
    """Nine tenths of what is free now, within the limit of the container this runs in, if any."""
    if device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        return int(free_bytes * _USABLE_SHARE)
    available: int = psutil.virtual_memory().available
    left = _left_in_container(_CGROUP)
    return int(min(available, available if left is None else left) * _USABLE_SHARE)


def _left_in_container(folder: Path) -> int | None:
    """What a cgroup (version 2) leaves; None without a limit. Page cache can be taken back."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return max(0, int(limit) - used + cached)
