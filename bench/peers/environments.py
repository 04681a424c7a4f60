"""The environments of other engines: made once, from wheels, in the cache. Nothing of Shoal's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.peers.process import ROOT
from shoal.weights.cache import cache_root, locked

Report = Callable[[str], None]

_CONSTRAINTS = ROOT / "constraints.txt"
_READY = "shoal-bench-ready.txt"


def peers_folder() -> Path:
    return cache_root() / "bench" / "peers"


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def installed(name: str, steps: Sequence[Sequence[str]], report: Report) -> Path:
    """The Python of an environment with these requirements, installed step by step if need be.

    Versions that Shoal pins as well are Shoal's. Raises RuntimeError with pip's last words.
    """
    folder = peers_folder() / name
    wanted = "\n".join(" ".join(step) for step in steps)
    ready = folder / _READY
    with locked(peers_folder() / f"{name}.lock"):
        if not ready.is_file() or ready.read_text(encoding="utf-8") != wanted:
            report(f"installing {name} into {folder}")
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            for step in steps:
                pip = (str(python_of(folder)), "-m", "pip", "install", "--quiet")
                _run([*pip, "--constraint", str(_CONSTRAINTS), *step])
            ready.write_text(wanted, encoding="utf-8")
    return python_of(folder)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout)[-2000:]}")
