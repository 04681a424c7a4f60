"""An engine in a process of its own, in its own environment. It computes only while it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.peers.protocol import Settings, call_line, parse_answer

ROOT = Path(__file__).resolve().parents[2]

_LAST_LINES = 15
_PATIENCE_S = 30.0


class EngineProcess:
    """A context manager. `about` is what the engine said of itself once it had loaded.

    Raises RuntimeError, with the end of what the process wrote to stderr, if it dies.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        settings: Settings,
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        # Open as long as the process is; `close` closes it.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), "-m", module, json.dumps(settings)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(call_line(what, arguments))
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return parse_answer(line, self.name)

    def _died(self) -> RuntimeError:
        status = self._process.wait(_PATIENCE_S)
        self._log.seek(0)
        last = "".join(self._log.readlines()[-_LAST_LINES:])
        return RuntimeError(f"{self.name} ended with status {status}:\n{last}")


def thread_settings(threads: int) -> dict[str, str]:
    """As environment, for libraries that count their threads before anybody can tell them."""
    names: Sequence[str] = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
