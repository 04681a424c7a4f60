"""This machine's part of the Ray cluster under Shoal: started, watched and ended as one process.

Ray finds the nodes, restarts and reports; it carries no tensors. It always runs with the
cluster's certificates and a token: its ports would be open shells without them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from shoal.errors import ConfigError, InternalError, OperatorError
from shoal.fleet.state import STATE_VARIABLE, Membership, StateFolder
from shoal.parallel.identity import CA_FILE, NODE_FILE, NODE_KEY_FILE

NODE_LABEL = "shoal.dev/node"
START_TIMEOUT_S = 90.0
GRACE_S = 8.0
STOP_TIMEOUT_S = GRACE_S + 7.0
# The least that Ray takes: no tensor ever lies in its store.
OBJECT_STORE_BYTES = 80_000_000
# How long a node works on without the head before it leaves and asks anew.
WITHOUT_HEAD_S = 600
_STARTED = "Ray runtime started"
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def require_ray() -> None:
    """Raises ConfigError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "a cluster of several machines needs Ray: pip install 'shoal[cluster]' (on one "
            "machine 'shoal serve --pipeline' and '--tensor' work without)"
        )


def ray_environment(folder: StateFolder) -> dict[str, str]:
    """What every process that is or uses Ray must see, the same on all nodes.

    Health checks: a killed node is noticed in 0.6 s, a frozen one in about 2 s.
    """
    return {
        STATE_VARIABLE: str(folder.path),
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(folder.identity / CA_FILE),
        "RAY_TLS_SERVER_CERT": str(folder.identity / NODE_FILE),
        "RAY_TLS_SERVER_KEY": str(folder.identity / NODE_KEY_FILE),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder.ray_token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "250",
        "RAY_health_check_timeout_ms": "500",
        "RAY_health_check_failure_threshold": "3",
        # Shoal plans memory itself; Ray must not kill workers by its own rules.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(WITHOUT_HEAD_S),
    }


def use_ray(folder: StateFolder) -> None:
    """Set up this process for the cluster's Ray: before `shoal.fleet.launch_ray` is imported.

    Ray reads its settings from the environment, when it is imported. Raises ConfigError if it is
    not installed, InternalError if it is imported already with others.
    """
    require_ray()
    settings = ray_environment(folder)
    if "ray" in sys.modules and any(os.environ.get(key) != settings[key] for key in settings):
        raise InternalError("Ray was imported before its settings were known")
    os.environ.update(settings)


def start_command(membership: Membership, scratch: Path, num_cores: int) -> list[str]:
    """The `ray start` of the head or of another node, in the foreground."""
    command = [
        *(*_RAY, "start", "--block", "--disable-usage-stats"),
        f"--node-ip-address={membership.address}",
        f"--num-cpus={num_cores}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-log-monitor=false",
        f"--temp-dir={scratch}",
        f"--labels={NODE_LABEL}={membership.node}",
    ]
    if membership.is_head:
        return [
            *command,
            "--head",
            f"--port={membership.ray_port}",
            *_client_port(membership),
            "--include-dashboard=false",
        ]
    return [*command, f"--address={membership.ray_address}"]


def _client_port(membership: Membership) -> list[str]:
    """A plain Ray has no client server. With grpc installed it has one, which cannot be switched
    off, so it must at least be where we know."""
    if importlib.util.find_spec("grpc") is None:
        return []
    return [f"--ray-client-server-port={membership.ray_client_port}"]


class RayNode:
    """Ray's processes on this machine, under a guard that leaves none behind."""

    def __init__(self, folder: StateFolder, membership: Membership) -> None:
        self._folder = folder
        self._membership = membership
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to start. Raises ConfigError if Ray is missing or its ports are taken."""
        require_ray()
        membership = self._membership
        if membership.is_head:
            for port in (membership.ray_port, membership.ray_client_port):
                check_port(membership.address, port)
        scratch = self._folder.scratch()
        shutil.rmtree(scratch, ignore_errors=True)  # logs of the last time
        environment = {**os.environ, **ray_environment(self._folder)}
        if membership.is_head:
            self._folder.ray_storage.mkdir(mode=0o700, parents=True, exist_ok=True)
            environment["RAY_gcs_storage"] = "rocksdb"
            environment["RAY_gcs_storage_path"] = str(self._folder.ray_storage)
        command = start_command(membership, scratch, len(os.sched_getaffinity(0)))
        with self._folder.ray_log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shoal.fleet.guard", str(GRACE_S), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C in the terminal is for Shoal, which then ends Ray in order.
                start_new_session=True,
            )

    def is_up(self) -> bool:
        """Whether it has started. Raises OperatorError if it never will."""
        if not self.is_running():
            raise OperatorError(f"Ray did not start; {self.last_words()}")
        return _STARTED in self._folder.ray_log.read_text(errors="replace")

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """Where its output is, and the end of it."""
        lines = self._folder.ray_log.read_text(errors="replace").strip().splitlines()
        return f"{self._folder.ray_log} ends with:\n" + "\n".join(lines[-8:])

    def stop(self) -> None:
        """End all its processes. Takes a few seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(node: RayNode, is_cancelled: threading.Event) -> bool:
    """False if cancelled. Raises OperatorError."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not node.is_up():
        if time.monotonic() > deadline_s:
            raise OperatorError(f"Ray took over {START_TIMEOUT_S:g} s; {node.last_words()}")
        if is_cancelled.wait(0.1):
            return False
    return True


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if somebody listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Ray needs port {port} of {host}: {error.strerror}; 'shoal head --port N' takes "
                "N, N+1 and N+2",
                param="port",
            ) from error
