"""The two sides of a comparison: a git revision or the working tree, and settings."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import msgspec

from bench.peers.process import ROOT

WORKING_TREE = "."


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """`options` are arguments of `shoal.LLM`, `environment` the variables of the process."""

    revision: str
    options: dict[str, Any]
    environment: dict[str, str]


def parse_side(text: str) -> Side:
    """`HEAD~1 quantize=int8 OMP_WAIT_POLICY=passive`: a name in capitals is of the environment.

    Values are JSON where they can be, else text. Raises ValueError for what is no setting.
    """
    words = text.split()
    if not words or "=" in words[0]:
        raise ValueError(f"'{text}' does not begin with a git revision, or . for the working tree")
    options: dict[str, Any] = {}
    environment: dict[str, str] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ValueError(f"'{word}' in '{text}' is not of the form name=value")
        if name.isupper():
            environment[name] = value
        else:
            options[name] = _value(value)
    return Side(revision=words[0], options=options, environment=environment)


def unpacked(side: Side, folder: Path) -> Path:
    """The side's `src`: of the working tree, or written into `folder` from its revision.

    Raises RuntimeError for a revision that git does not know.
    """
    if side.revision == WORKING_TREE:
        return ROOT / "src"
    command = ["git", "archive", "--format=tar", side.revision, "src"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def commit_of(side: Side) -> str:
    """Short, with a + where the working tree has changes of its own."""
    revision = "HEAD" if side.revision == WORKING_TREE else side.revision
    short = _git("rev-parse", "--short", f"{revision}^{{commit}}")
    is_changed = side.revision == WORKING_TREE and _git("status", "--porcelain", "src")
    return f"{short}+" if is_changed else short


def python_path(source: Path, side: Side) -> str:
    """The side's own source before everything else, then what it was given."""
    return os.pathsep.join(filter(None, (str(source), side.environment.get("PYTHONPATH", ""))))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
