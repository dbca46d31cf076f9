"""Hosts as pods of an indexed Job (or a JobSet), made and looked at with ``kubectl``.

What is made is in ``manifests.py``, how its state is read in ``pods.py``. Addresses are those of the pods, so the
script runs in the cluster, or where the pods' network is routed to. It is Kubernetes that starts a lost pod anew, under
its old index.

It needs the rights to create, list and delete jobs, pods, services and secrets in its namespace, and to read the logs
of pods.

Nothing here has met a real cluster yet: tests check the manifests against Kubernetes' own schemas, and run the real
kubectl, and the pods' commands as processes, against a server that stands for one.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .errors import Attempt, JobError, LaunchError
from .job import Job
from .launch import run_tool
from .manifests import CONTAINER, ID_LABEL, KubernetesSpec, manifests
from .pods import Seen, read

if TYPE_CHECKING:
    from pathlib import Path

    from .launch import Output
    from .spec import HostRecord
    from .state import Record

REQUEST_S: Final = 20.0
"""Limit of one request to the API server."""
END_S: Final = 30.0
"""How long the deletion of a job may take besides the time that its pods have to end."""
HARD_GRACE_S: Final = 5
"""Time that a pod has to end whose host was lost already."""

_NO_KUBECTL: Final = (
    "install kubectl (https://kubernetes.io/docs/tasks/tools/) and give it access to the cluster (kubectl get pods), "
    "or print the manifests here and apply them elsewhere: danaus job render FILE --key KEYFILE"
)


class KubernetesJob(Job[KubernetesSpec]):
    """Hosts from Kubernetes: an indexed Job, a headless Service and the key in a Secret, or a JobSet.

    Args:
        image: A container image with danaus of this version and its command on the search path.
        hosts: How many pods, each a host.
        namespace: Where they are made.
        context: Context of kubectl's configuration; by default the current one.
        port: Where the daemons listen.
        gpus: GPUs of each host; ``gpu_resource`` is what the cluster calls them.
        gpu_resource: As ``nvidia.com/gpu``.
        cpu: CPUs of each host, as ``"16"``.
        memory: Memory of each host, as ``"64Gi"``.
        labels: Further labels on all that is made.
        node_selector: Labels of the nodes to use.
        service_account: Service account of the pods; they get no token without.
        run_as_user: User id of the processes in the pods.
        env: Environment variables of the daemons; no place for secrets.
        preempt_s: Time that actors have to drain when their pod is told to end.
        jobset: Make a JobSet, which needs that operator in the cluster.
        pod: Laid over the pods' spec (tolerations, volumes, pull secrets...): mappings merged, lists appended.
        container: The same for the container's.
        name: Name of the Job, and prefix of its pods' names.
        replace_lost: How often the pod of an index may fail and come back; disruptions (drained, preempted, evicted)
            do not count. Kubernetes knows it from the start of the job.
    """

    default_timeout_s: ClassVar[float] = 900.0
    poll_s: ClassVar[float] = 2.0

    def __init__(
        self,
        *,
        image: str,
        hosts: int = 1,
        namespace: str = "default",
        context: str | None = None,
        port: int = 26600,
        gpus: int = 0,
        gpu_resource: str = "nvidia.com/gpu",
        cpu: str | float | None = None,
        memory: str | None = None,
        labels: dict[str, str] | None = None,
        node_selector: dict[str, str] | None = None,
        service_account: str | None = None,
        run_as_user: int | None = None,
        env: dict[str, str] | None = None,
        preempt_s: float = 10.0,
        jobset: bool = False,
        pod: dict[str, Any] | None = None,
        container: dict[str, Any] | None = None,
        name: str = "",
        replace_lost: int = 0,
    ) -> None:
        super().__init__(
            KubernetesSpec(
                image=image,
                hosts=hosts,
                namespace=namespace,
                context=context,
                port=port,
                gpus=gpus,
                gpu_resource=gpu_resource,
                cpu=None if cpu is None else str(cpu),
                memory=memory,
                labels=dict(labels or {}),
                node_selector=dict(node_selector or {}),
                service_account=service_account,
                run_as_user=run_as_user,
                env=dict(env or {}),
                preempt_s=preempt_s,
                jobset=jobset,
                pod=dict(pod or {}),
                container=dict(container or {}),
                name=name,
                replace_lost=replace_lost,
            )
        )

    def render(self, *, key_file: str | Path | None = None) -> str:
        """Return the manifests as YAML.

        Args:
            key_file: Key that the Secret is to hold, for ``kubectl apply -f -``. Without it the Secret has a mark in
                its place, and the text may be shown to anybody.

        Raises:
            JobError: PyYAML is not installed.
        """
        key = None
        if key_file is not None:
            from ..network.keys import format_key, read_key_file

            key = format_key(read_key_file(key_file)).decode()
        try:
            import yaml
        except ImportError as error:
            raise JobError("manifests are printed with PyYAML: pip install 'danaus[jobs]'") from error
        return yaml.safe_dump_all(manifests(self.spec, key=key), sort_keys=False)

    def logs(self, host: int, *, lines: int = 200) -> str:
        """Return the last lines that the daemon of a host wrote, with kubectl's help."""
        pod = self._look(self._record()).pods[host]
        if not pod:
            raise JobError(f"job {self.name!r}: host {host} has no pod whose output could be read")
        return self._checked(
            self._kubectl("logs", f"pod/{pod}", "-c", CONTAINER, f"--tail={lines}"), "reading a pod's output"
        ).out

    def pod_of(self, host: int) -> str:
        """Return the name of a host's newest pod, "" if it has none."""
        return self._look(self._record()).pods[host]

    def _launch(self, directory: Path, key_file: Path) -> dict[str, Any]:  # noqa: ARG002  pods keep their own output
        from ..network.keys import format_key, read_key_file

        job_id = secrets.token_hex(8)
        secret, *others = manifests(self.spec, key=format_key(read_key_file(key_file)).decode(), job_id=job_id)
        # The Secret alone first: where it exists, another job has this name, and nothing of it must be touched.
        self._launched(self._create([secret]))
        created = self._create(others)
        if created.code != 0:
            self._delete(job_id, wait=False)
            self._launched(created)
        return {"id": job_id}

    def _create(self, items: list[dict[str, Any]]) -> Output:
        # Not as one List, for which kubectl downloads every schema there is.
        text = "\n".join(map(json.dumps, items))
        return self._kubectl("create", "-f", "-", stdin=text.encode())

    def _launched(self, output: Output) -> None:
        if output.code == 0:
            return
        advice = ""
        if output.code is None and "no program" in output.err:
            advice = _NO_KUBECTL
        elif "AlreadyExists" in output.err:
            advice = (
                f"namespace {self.spec.namespace!r} has something of that name, perhaps a job that another machine "
                f"started: choose another name=, or see kubectl -n {self.spec.namespace} get all,secret"
            )
        elif 'no matches for kind "JobSet"' in output.err:
            advice = "the cluster has no JobSet operator (https://jobset.sigs.k8s.io): leave out jobset=True"
        raise LaunchError(self.name, (output.attempt("the cluster"),), advice)

    def _observe(self, record: Record) -> tuple[list[HostRecord], str]:
        seen = self._look(record)
        return seen.hosts, seen.detail

    def _look(self, record: Record) -> Seen:
        selector = f"{ID_LABEL}={record.launched.get('id', '')}"
        output = self._kubectl("get", "jobs,pods", "-l", selector, "-o", "json")
        return read(json.loads(self._checked(output, "looking at the job").out)["items"], self.spec)

    def _replace(self, record: Record, index: int) -> dict[str, Any]:
        seen = self._look(record)
        host = seen.hosts[index]
        if host.status == "ended" or not seen.may_return:
            reason = f"{host.detail or seen.detail}; Kubernetes starts no other pod for index {index}"
            attempt = Attempt(f"host {index} ({host.name})", "(what the Job did)", None, reason)
            raise LaunchError(self.name, (attempt,), "start the job with a higher replace_lost=")
        if host.status == "running":
            # Kubernetes thinks that it is well; its Job makes another as soon as this one is gone.
            output = self._kubectl(
                "delete",
                f"pod/{seen.pods[index]}",
                "--ignore-not-found",
                f"--grace-period={HARD_GRACE_S}",
                "--wait=false",
            )
            self._checked(output, f"deleting the pod of host {index}")
        return record.launched

    def _end(self, record: Record) -> None:
        if "id" in record.launched:
            for output in self._delete(record.launched["id"], wait=True):
                # Without the operator there can be no JobSet.
                if "have a resource type" not in output.err:
                    self._checked(output, "deleting the job")

    def _delete(self, job_id: str, *, wait: bool) -> list[Output]:
        limit_s = self.spec.preempt_s + END_S
        flags = ["--cascade=foreground", f"--timeout={limit_s:g}s"] if wait else ["--wait=false"]
        selector = ["-l", f"{ID_LABEL}={job_id}", "--ignore-not-found"]
        # Apart: where one kind is unknown, kubectl deletes nothing of the others.
        kinds = ["jobsets.jobset.x-k8s.io", "secrets"] if self.spec.jobset else ["jobs,services,secrets"]
        return [self._kubectl("delete", kind, *selector, *flags, timeout_s=limit_s + REQUEST_S) for kind in kinds]

    def _kubectl(self, verb: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 2 * REQUEST_S) -> Output:
        context = ["--context", self.spec.context] if self.spec.context else []
        command = [
            "kubectl",
            verb,
            *arguments,
            "-n",
            self.spec.namespace,
            f"--request-timeout={REQUEST_S:g}s",
            *context,
        ]
        return run_tool(command, stdin=stdin, timeout_s=timeout_s)

    def _checked(self, output: Output, what: str) -> Output:
        if output.code == 0:
            return output
        advice = f"\n{_NO_KUBECTL}" if output.code is None and "no program" in output.err else ""
        raise JobError(f"job {self.name!r}: {what} failed: {output.attempt('the cluster')}{advice}")
