"""The Kubernetes example, offline: its fields exist, its parts fit, its commands are Shoal's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main
import yaml
from kubernetes_types import (
    KINDS,
    Container,
    Part,
    PersistentVolumeClaim,
    PodSpec,
    RayCluster,
    Service,
)

from shoal.cli.app import app
from shoal.fleet.state import DEFAULT_PORT

MANIFEST = Path(__file__).parents[2] / "deploy/kubernetes/shoal.yaml"
# Set by Kubernetes where `$(NAME)` stands, from the container's own variables.
CLUSTER_LABELS = {"ray.io/cluster": "shoal", "ray.io/node-type": "head"}


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


RESOURCES: list[Part] = [
    msgspec.convert(document, type=KINDS[document["kind"]]) for document in documents()
]
CLUSTER = next(each for each in RESOURCES if isinstance(each, RayCluster))
PODS: dict[str, PodSpec] = {"head": CLUSTER.spec.head_group_spec.template.spec} | {
    group.group_name: group.template.spec for group in CLUSTER.spec.worker_group_specs
}
CONTAINERS = [(pod, container) for pod, spec in PODS.items() for container in spec.containers]
each_container = pytest.mark.parametrize(
    ("pod", "container"), CONTAINERS, ids=[f"{pod}-{one.name}" for pod, one in CONTAINERS]
)


def test_a_misspelt_field_would_be_noticed() -> None:
    document = next(each for each in documents() if each["kind"] == "RayCluster")
    document["spec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(msgspec.ValidationError, match="rayStartParam"):
        msgspec.convert(document, type=RayCluster)


def test_a_head_and_two_unequal_groups() -> None:
    large, small = CLUSTER.spec.worker_group_specs
    sizes = [group.template.spec.containers[0].resources.requests for group in (large, small)]
    assert sizes[0] != sizes[1]
    for group in (large, small):
        assert group.min_replicas <= group.replicas <= group.max_replicas


@each_container
def test_what_is_mounted_is_there(pod: str, container: Container) -> None:
    volumes = [volume.name for volume in PODS[pod].volumes]
    assert len(set(volumes)) == len(volumes)
    assert {mount.name for mount in container.volume_mounts} == set(volumes)


def test_the_heads_state_outlives_its_pod() -> None:
    state = next(volume for volume in PODS["head"].volumes if volume.name == "state")
    assert state.persistent_volume_claim is not None
    claims = [each.metadata.name for each in RESOURCES if isinstance(each, PersistentVolumeClaim)]
    assert state.persistent_volume_claim.claim_name in claims


@each_container
def test_probes_and_variables_name_what_is_there(pod: str, container: Container) -> None:
    del pod
    ports = {port.name for port in container.ports}
    for probe in (container.startup_probe, container.readiness_probe, container.liveness_probe):
        for target in (probe and probe.tcp_socket, probe and probe.http_get):
            assert target is None or isinstance(target.port, int) or target.port in ports
    variables = {variable.name for variable in container.env}
    for word in container.command:
        assert not word.startswith("$(") or word[2:-1] in variables


@each_container
def test_commands_are_shoals(pod: str, container: Container) -> None:
    del pod
    program, command, *words = container.command
    assert program == "shoal"
    root = typer.main.get_command(app)
    found = root.commands[command]  # type: ignore[attr-defined]
    known = {
        option
        for parameter in found.params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    for word in words:
        assert not word.startswith("--") or word in known, word


def test_services_find_the_head_at_its_ports() -> None:
    services = {each.metadata.name: each for each in RESOURCES if isinstance(each, Service)}
    assert all(service.spec.selector == CLUSTER_LABELS for service in services.values())
    assert CLUSTER.metadata.name == CLUSTER_LABELS["ray.io/cluster"]
    open_ports = {port.container_port for one in PODS["head"].containers for port in one.ports}
    for service in services.values():
        assert {port.target_port or port.port for port in service.spec.ports} <= open_ports
    # A certificate is for the pod's address: the name must lead there and not to a virtual one.
    assert services["shoal-head"].spec.cluster_ip == "None"
    assert DEFAULT_PORT in {port.port for port in services["shoal-head"].spec.ports}
    joins = [one.command[2] for pod, one in CONTAINERS if pod != "head"]
    assert joins == ["shoal-head"] * len(joins)


def test_secrets_come_from_secrets() -> None:
    for pod, container in CONTAINERS:
        given = {variable.name: variable for variable in container.env}
        assert ("SHOAL_TOKEN" in given) == (pod != "head")
        if pod != "head":
            source = given["SHOAL_TOKEN"].value_from
            assert source is not None
            assert source.secret_key_ref is not None
            assert f"secret generic {source.secret_key_ref.name} " in (
                MANIFEST.with_name("README.md").read_text()
            )
    assert "ray.io/overwrite-container-cmd" in CLUSTER.metadata.annotations
