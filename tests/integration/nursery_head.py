"""A head that has a launcher start workers which may outlive it, to be killed: see its test."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from scripted_head import ScriptedHead, ScriptedLine, form_of, load_of, plan_of
from shared_models import ALL

from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.messages import StepResult
from shoal.parallel.control import Formed, Loaded

START_S = 60.0


def main(folder: Path, model: Path, hold_s: float) -> None:
    head = ScriptedHead(folder)
    launcher = LocalLauncher(head.address, folder, print, cores=[], hold_s=hold_s)
    launcher.start("a", LOCAL_NODE, num_threads=1)
    line = ScriptedLine()
    head.answer(line, within_s=START_S)
    line.say(load_of(model, ALL, hold_s=hold_s))
    assert line.hear(Loaded).num_read_bytes > 0
    line.say(form_of(1))
    line.hear(Formed)
    line.say(plan_of(1))
    line.hear(StepResult)
    launcher.start_spare("idle", LOCAL_NODE)
    head.answer(ScriptedLine())
    print("ready", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
