"""What a job on Kubernetes consists of, as plain dicts: nothing here talks to a cluster.

Without an operator (the default) these are an indexed Job, whose pods come back under the same index, a headless
Service, which gives each index a name that outlives its pod, and a Secret with the host key. With the JobSet operator
the Service is the operator's. Needs Kubernetes 1.29 or newer, for the retries per index.

The key is only ever in the Secret: pods see it as a file of mode 0400, never as a variable or an argument. Pods of a
job talk to each other on many ports, so a network policy has to allow all of TCP among those of one label.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from .spec import JobSpec

Manifest = dict[str, Any]

LABEL: Final = "danaus.dev/job"
"""On everything that belongs to a job; its value is the job's name."""
ID_LABEL: Final = "danaus.dev/id"
"""On everything that one start of a job made: nothing else is looked at or deleted."""
INDEX_ANNOTATION: Final = "batch.kubernetes.io/job-completion-index"
"""Kubernetes puts it on the pods of an indexed Job."""
CONTAINER: Final = "danaus-host"
"""Name of the daemon's container."""
REDACTED: Final = "<redacted>"

_KEY_DIRECTORY: Final = "/etc/danaus"
_KEY_COPY: Final = "/run/danaus"
_STATE_DIRECTORY: Final = "/var/lib/danaus"
_LABEL_RULE: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MAX_LABEL: Final = 63
_END_S: Final = 20.0
"""What a host needs after its actors have drained: its processes' cleanup, SIGTERM, SIGKILL, and its own end."""


@dataclass(frozen=True, kw_only=True)
class KubernetesSpec(JobSpec):
    """What is asked for."""

    kind: ClassVar[str] = "kubernetes"

    image: str
    """A container image that has danaus of this version installed, and its command on the search path."""
    hosts: int = 1
    """How many pods, each a host."""
    namespace: str = "default"
    """Namespace that they are made in; it must exist."""
    context: str | None = None
    """Context of kubectl's configuration; by default the current one."""
    port: int = 26600
    """Where the daemons listen, in each pod."""
    gpus: int = 0
    """GPUs of each host."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls them."""
    cpu: str | None = None
    """CPUs of each host, as ``16`` or ``500m``."""
    memory: str | None = None
    """Memory of each host, as ``64Gi``; shared memory counts as well."""
    labels: dict[str, str] = field(default_factory=dict[str, str])
    """Further labels on all that is made."""
    node_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels that a node must have to be used."""
    service_account: str | None = None
    """Service account of the pods, whose token they get; none by default."""
    run_as_user: int | None = None
    """User id of the processes in the pods; by default that of the image."""
    env: dict[str, str] = field(default_factory=dict[str, str])
    """Environment variables of the daemon; no place for secrets."""
    preempt_s: float = 10.0
    """Time that actors have to drain when their pod is told to end."""
    jobset: bool = False
    """Make a JobSet instead of a Job and a Service; needs that operator in the cluster."""
    pod: dict[str, Any] = field(default_factory=dict[str, Any])
    """What is laid over the pods' spec: mappings are merged, lists appended, all else replaced."""
    container: dict[str, Any] = field(default_factory=dict[str, Any])
    """The same for the container's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cpu", "memory"):
            if isinstance(getattr(self, name), (int, float)):
                object.__setattr__(self, name, f"{getattr(self, name):g}")
        for name, least in (("hosts", 1), ("gpus", 0), ("preempt_s", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"a kubernetes job's {name}={getattr(self, name)}: expected {least} or more")
        if not self.image.strip():
            raise ValueError("a kubernetes job's image='': name one that has danaus installed, as REGISTRY/NAME:TAG")
        if not 0 < self.port < 1 << 16:
            raise ValueError(f"a kubernetes job's port={self.port}: expected 1 to 65535")
        self._check_names()

    def _check_names(self) -> None:
        for name, value in (("name", self.name), ("namespace", self.namespace)):
            if not _LABEL_RULE.fullmatch(value):
                raise ValueError(
                    f"a kubernetes job's {name}={value!r}: expected lower-case letters, digits and '-', a letter first "
                    "and no '-' last, since names of Kubernetes are made of it"
                )
        longest = f"{self.pod_prefix}-{self.hosts - 1}"
        if len(longest) > _MAX_LABEL:
            raise ValueError(
                f"a kubernetes job's name={self.name!r}: {len(longest) - _MAX_LABEL} characters too long, since "
                f"{longest!r} must fit into {_MAX_LABEL}"
            )

    @property
    def secret_name(self) -> str:
        """Name of the Secret that holds the key."""
        return f"{self.name}-key"

    @property
    def pod_prefix(self) -> str:
        """Hostname of every pod, without its index."""
        return f"{self.name}-hosts-0" if self.jobset else self.name

    def host_name(self, index: int) -> str:
        """Return the DNS name of a host inside the cluster; it outlives the pod."""
        return f"{self.pod_prefix}-{index}.{self.name}.{self.namespace}.svc"


def manifests(spec: KubernetesSpec, *, key: str | None, job_id: str | None = None) -> list[Manifest]:
    """Return what to create, in that order: first the Secret.

    Args:
        spec: What the job is to look like.
        key: Text of the host key; None leaves a mark in its place.
        job_id: What tells this start of the job from others of the same name.
    """
    made = _Manifests(spec, job_id)
    if spec.jobset:
        return [made.secret(key), made.jobset()]
    return [made.secret(key), made.service(), made.job()]


class _Manifests:
    def __init__(self, spec: KubernetesSpec, job_id: str | None) -> None:
        self._spec = spec
        own = {"app.kubernetes.io/name": "danaus-host", "app.kubernetes.io/managed-by": "danaus", LABEL: spec.name}
        self._labels = {**spec.labels, **own, **({ID_LABEL: job_id} if job_id else {})}

    def secret(self, key: str | None) -> Manifest:
        if key is None:
            content: Manifest = {"stringData": {"key": REDACTED}}
        else:
            content = {"data": {"key": base64.b64encode(key.encode()).decode()}}
        return {**self._head("v1", "Secret", self._spec.secret_name), "type": "Opaque", **content}

    def service(self) -> Manifest:
        port = self._spec.port
        spec = {
            # Headless: no address of its own, a DNS name per pod instead, there before the pod is ready.
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL: self._spec.name},
            "ports": [{"name": "danaus", "port": port, "targetPort": port, "protocol": "TCP"}],
        }
        return {**self._head("v1", "Service", self._spec.name), "spec": spec}

    def job(self) -> Manifest:
        return {**self._head("batch/v1", "Job", self._spec.name), "spec": self._job_spec()}

    def jobset(self) -> Manifest:
        template = {"metadata": {"labels": self._labels}, "spec": self._job_spec()}
        spec = {
            "network": {"enableDNSHostnames": True, "subdomain": self._spec.name, "publishNotReadyAddresses": True},
            # A restart of the set would end the hosts that are well; lost pods come back by themselves.
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": template}],
        }
        return {**self._head("jobset.x-k8s.io/v1alpha2", "JobSet", self._spec.name), "spec": spec}

    def _head(self, version: str, kind: str, name: str) -> Manifest:
        metadata = {"name": name, "namespace": self._spec.namespace, "labels": dict(self._labels)}
        return {"apiVersion": version, "kind": kind, "metadata": metadata}

    def _job_spec(self) -> Manifest:
        spec = self._spec
        # A pod that is drained, preempted or evicted is at no fault of its own, and does not count as a failure.
        on_disruption = "Ignore" if spec.replace_lost else "FailIndex"
        disrupted = [{"type": "DisruptionTarget", "status": "True"}]
        return {
            "completionMode": "Indexed",
            "completions": spec.hosts,
            "parallelism": spec.hosts,
            "backoffLimitPerIndex": spec.replace_lost,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [{"action": on_disruption, "onPodConditions": disrupted}]},
            "template": {"metadata": {"labels": dict(self._labels)}, "spec": merged(self._pod(), spec.pod)},
        }

    def _pod(self) -> Manifest:
        spec = self._spec
        key_file = {"key": "key", "path": "key", "mode": 0o400}
        pod: Manifest = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": math.ceil(spec.preempt_s + _END_S),
            "automountServiceAccountToken": spec.service_account is not None,
            # Else every Service of the namespace would be in the environment of every process.
            "enableServiceLinks": False,
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": {LABEL: spec.name}},
                }
            ],
            "containers": [merged(self._container(), spec.container)],
            "volumes": [
                {"name": "key", "secret": {"secretName": spec.secret_name, "defaultMode": 0o400, "items": [key_file]}},
                # The default of 64 MiB is too small for tensors in shared memory, and for NCCL.
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
                # Log files, and what is synced to the host; a home directory may not be writable, or not be there.
                {"name": "state", "emptyDir": {}},
            ],
        }
        if spec.run_as_user is not None:
            user = spec.run_as_user
            pod["securityContext"] = {"runAsUser": user, "runAsGroup": user, "fsGroup": user}
            pod["volumes"].append({"name": "key-copy", "emptyDir": {"medium": "Memory"}})
        # JobSet fills in its own.
        optional = {
            "subdomain": None if spec.jobset else spec.name,
            "nodeSelector": dict(spec.node_selector) or None,
            "serviceAccountName": spec.service_account,
        }
        return {**pod, **{name: value for name, value in optional.items() if value is not None}}

    def _container(self) -> Manifest:
        spec = self._spec
        index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_ANNOTATION}']"}}
        mounts = [
            {"name": "key", "mountPath": _KEY_DIRECTORY, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108  the container's own
            {"name": "state", "mountPath": _STATE_DIRECTORY},
        ]
        if spec.run_as_user is not None:
            mounts.append({"name": "key-copy", "mountPath": _KEY_COPY})
        return {
            "name": CONTAINER,
            "image": spec.image,
            "command": self._command(),
            "env": [
                {"name": "DANAUS_HOST_INDEX", "valueFrom": index},
                {"name": "DANAUS_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "DANAUS_PREEMPT_S", "value": f"{spec.preempt_s:g}"},
                {"name": "DANAUS_STATE_DIR", "value": _STATE_DIRECTORY},
                {"name": "DANAUS_LOG_DIR", "value": f"{_STATE_DIRECTORY}/logs"},
                *({"name": name, "value": value} for name, value in spec.env.items()),
            ],
            "ports": [{"name": "danaus", "containerPort": spec.port, "protocol": "TCP"}],
            "readinessProbe": {"tcpSocket": {"port": spec.port}, "periodSeconds": 5},
            "resources": self._resources(),
            "volumeMounts": mounts,
        }

    def _command(self) -> list[str]:
        spec = self._spec
        where = ["--listen", f"tcp://0.0.0.0:{spec.port}", "--advertise", "$(DANAUS_POD_IP)"]
        host = ["danaus", "host", *where, "--name", f"{spec.pod_prefix}-$(DANAUS_HOST_INDEX)", "--key"]
        if spec.run_as_user is None:
            return [*host, f"{_KEY_DIRECTORY}/key"]
        # What is mounted belongs to root, and to others than root Kubernetes gives it through their group only.
        copy = f'umask 077 && cp {_KEY_DIRECTORY}/key {_KEY_COPY}/key && exec "$@"'
        return ["sh", "-c", copy, "sh", *host, f"{_KEY_COPY}/key"]

    def _resources(self) -> Manifest:
        spec = self._spec
        wanted = {"cpu": spec.cpu, "memory": spec.memory, spec.gpu_resource: str(spec.gpus) if spec.gpus else None}
        amounts = {name: amount for name, amount in wanted.items() if amount is not None}
        # Equal requests and limits: such pods are the last to be evicted, and GPUs allow nothing else.
        return {"requests": dict(amounts), "limits": dict(amounts)} if amounts else {}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Manifest:
    """Return ``base`` with ``changes`` laid over it: mappings are merged, lists appended, all else is replaced."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[name] = merged(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            result[name] = [*old, *value]
        else:
            result[name] = value
    return result
