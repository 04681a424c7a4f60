"""`shoal head` and `shoal join` as processes on hosts of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from namespaces import Host

SHOAL = str(Path(sys.executable).parent / "shoal")
START_S = 60.0


@dataclass
class Running:
    """A command, and the file that its output goes to."""

    process: subprocess.Popen[bytes]
    log: Path
    state: Path

    def wait_for(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """The first match in what it has said. Fails with all of it."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            # Looked at before the output: what a command says last is not to be missed.
            has_ended = self.process.poll() is not None
            if match := re.search(pattern, self.log.read_text()):
                return match
            if has_ended:
                break
            time.sleep(0.05)
        raise AssertionError(f"no '{pattern}' in:\n{self.log.read_text()}")

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@dataclass
class Machines:
    """Starts commands on hosts; every host keeps its state in a folder of its own."""

    folder: Path
    num_started: int = 0

    def start(self, host: Host, *words: str, state: str) -> Running:
        self.folder.mkdir(exist_ok=True)
        self.num_started += 1
        log = self.folder / f"{self.num_started}-{state}.log"
        environment = {**os.environ, "TMPDIR": str(self.folder), "COLUMNS": "200"}
        if words[0] == "join":
            # What other machines have of a model, they have from the head.
            environment["SHOAL_CACHE"] = str(self.cache(state))
        with log.open("ab") as output:
            process = subprocess.Popen(
                host.command(SHOAL, *words, "--state", str(self.folder / state)),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        return Running(process, log, self.folder / state)

    def cache(self, state: str) -> Path:
        return self.folder / f"cache-{state}"

    def say(self, host: Host, *words: str, state: str) -> str:
        """The output of a command that ends by itself."""
        running = self.start(host, *words, state=state)
        try:
            running.process.wait(START_S)
        finally:
            if running.process.poll() is None:
                running.stop()
        return running.log.read_text()


def join_words(head: Running) -> list[str]:
    """What a fresh token of the head says to type, without `shoal`."""
    return head.wait_for(r"shoal (join \S+ --token \S+)")[1].split()
