"""The parts of Kubernetes' and KubeRay's resources that deploy/ uses; all else is unknown.

Written from the public references: Kubernetes 1.30 core/v1, KubeRay ray.io/v1.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, msgspec.Meta(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
# Port names are shorter than others.
PortName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$")]
Path = Annotated[str, msgspec.Meta(pattern=r"^/")]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of all below."""


class Metadata(Part):
    name: Name
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}


class FieldRef(Part):
    field_path: Literal["status.podIP", "metadata.name", "metadata.namespace"]


class SecretKeyRef(Part):
    name: Name
    key: str


class ValueFrom(Part):
    field_ref: FieldRef | None = None
    secret_key_ref: SecretKeyRef | None = None


class Variable(Part):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class ContainerPort(Part):
    name: PortName
    container_port: Port


class Resources(Part):
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu", "storage"], Quantity]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity] = {}


class TcpProbe(Part):
    port: Port | PortName


class HttpProbe(Part):
    path: Path
    port: Port | PortName


class ExecProbe(Part):
    command: list[str]


class Probe(Part):
    tcp_socket: TcpProbe | None = None
    http_get: HttpProbe | None = None
    exec: ExecProbe | None = None
    period_seconds: Annotated[int, msgspec.Meta(ge=1)] = 10
    initial_delay_seconds: Annotated[int, msgspec.Meta(ge=0)] = 0
    failure_threshold: Annotated[int, msgspec.Meta(ge=1)] = 3


class Mount(Part):
    name: Name
    mount_path: Path


class Container(Part):
    name: Name
    image: str
    command: list[str]
    resources: Resources
    volume_mounts: list[Mount]
    env: list[Variable] = []
    ports: list[ContainerPort] = []
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    startup_probe: Probe | None = None


class EmptyDir(Part):
    medium: Literal["", "Memory"] = ""
    size_limit: Quantity | None = None


class Claim(Part):
    claim_name: Name


class Volume(Part):
    name: Name
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: Claim | None = None


class PodSecurity(Part):
    run_as_non_root: bool
    run_as_user: int
    fs_group: int
    fs_group_change_policy: Literal["OnRootMismatch", "Always"] = "Always"


class PodSpec(Part):
    containers: Annotated[list[Container], msgspec.Meta(min_length=1)]
    volumes: list[Volume]
    security_context: PodSecurity
    share_process_namespace: bool = False


class Template(Part):
    spec: PodSpec


class HeadGroup(Part):
    ray_start_params: dict[str, str]
    template: Template


class WorkerGroup(Part):
    group_name: Name
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: Template


class RayClusterSpec(Part):
    ray_version: str
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayCluster(Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class ServicePort(Part):
    name: PortName
    port: Port
    target_port: Port | PortName | None = None


class ServiceSpec(Part):
    selector: dict[str, str]
    ports: list[ServicePort]
    cluster_ip: Literal["None"] | None = msgspec.field(default=None, name="clusterIP")
    publish_not_ready_addresses: bool = False


class Service(Part):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class ClaimSpec(Part):
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteOncePod"]]
    resources: Resources


class PersistentVolumeClaim(Part):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


KINDS: dict[str, type[Part]] = {
    kind.__name__: kind for kind in (RayCluster, Service, PersistentVolumeClaim)
}
