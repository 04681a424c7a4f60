"""Network namespaces as machines: each with an address of its own, all on one bridge."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The same command on this host."""
        return ["ip", "netns", "exec", self.namespace, *words]


def why_not() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip"
    probe = f"shoal-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None if made.returncode == 0 else f"no network namespaces: {made.stderr.strip()}"


@contextmanager
def connected_hosts(count: int, network: str = "10.77.0") -> Iterator[list[Host]]:
    """Hosts with the addresses .1, .2, … and nothing else but loopback. Gone afterwards."""
    tag = f"sh{os.getpid() % 10**6}"
    bridge = f"{tag}br"
    hosts = [Host(f"{tag}-{i}", f"{network}.{i}") for i in range(1, count + 1)]
    try:
        _ip(f"link add {bridge} type bridge")
        _ip(f"link set {bridge} up")
        for i, host in enumerate(hosts):
            _ip(f"netns add {host.namespace}")
            _ip(f"link add {tag}v{i} type veth peer name eth0 netns {host.namespace}")
            _ip(f"link set {tag}v{i} master {bridge} up")
            _ip(f"-n {host.namespace} address add {host.address}/24 dev eth0")
            _ip(f"-n {host.namespace} link set eth0 up")
            _ip(f"-n {host.namespace} link set lo up")
        yield hosts
    finally:
        for i, host in enumerate(hosts):
            _ip(f"link delete {tag}v{i}", check=False)
            _ip(f"netns delete {host.namespace}", check=False)
        _ip(f"link delete {bridge}", check=False)


def cut(host: Host) -> None:
    """Pull the host's cable."""
    _ip(f"-n {host.namespace} link set eth0 down")


def mend(host: Host) -> None:
    _ip(f"-n {host.namespace} link set eth0 up")


def _ip(arguments: str, *, check: bool = True) -> None:
    subprocess.run(["ip", *arguments.split()], check=check, capture_output=True)
