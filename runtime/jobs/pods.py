"""Reads from Kubernetes' own words how the hosts of a job are. Pure: takes what ``kubectl get -o json`` printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .manifests import INDEX_ANNOTATION
from .spec import HostRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .manifests import KubernetesSpec

Item = dict[str, Any]
"""A Job or a Pod, as JSON."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The hosts of a job at one moment."""

    hosts: list[HostRecord]
    detail: str
    """What Kubernetes says of the job."""
    pods: list[str]
    """Name of each host's newest pod, "" where it has none."""
    may_return: bool
    """Whether Kubernetes starts another pod where one is lost."""


def read(items: Sequence[Item], spec: KubernetesSpec) -> Seen:
    """Return what is known of every host.

    Args:
        items: The Job, if there is one still, and its pods.
        spec: What was asked for.
    """
    job = next((item for item in items if item["kind"] == "Job"), None)
    pods: dict[int, list[Item]] = {}
    for item in items:
        index = item["metadata"].get("annotations", {}).get(INDEX_ANNOTATION)
        if item["kind"] == "Pod" and index is not None:
            pods.setdefault(int(index), []).append(item)
    newest = [max(pods.get(index, []), key=_age_order, default=None) for index in range(spec.hosts)]
    state = _JobState(job)
    return Seen(
        hosts=[_host(index, pod, state, spec) for index, pod in enumerate(newest)],
        detail=state.detail,
        pods=[pod["metadata"]["name"] if pod else "" for pod in newest],
        may_return=state.may_return,
    )


class _JobState:
    """What the Job says of itself."""

    def __init__(self, job: Item | None) -> None:
        status: Mapping[str, Any] = (job or {}).get("status", {})
        spec: Mapping[str, Any] = (job or {}).get("spec", {})
        ended = [c for c in _true(status) if c["type"] in {"Complete", "Failed"}]
        self._failed = indices(status.get("failedIndexes", ""))
        self._completed = indices(status.get("completedIndexes", ""))
        self.is_over = job is None or bool(ended)
        self.may_return = not self.is_over and spec.get("backoffLimitPerIndex", 0) > 0
        self.detail = _job_detail(job, ended)

    def is_done_with(self, index: int) -> bool:
        """Whether no further pod comes for ``index``."""
        return self.is_over or index in self._failed or index in self._completed


def _job_detail(job: Item | None, ended: Sequence[Item]) -> str:
    if job is None:
        return "Kubernetes has no such job any more"
    name = f"job {job['metadata']['name']}"
    if ended:
        said = (ended[0]["type"].lower(), ended[0].get("reason", ""), ended[0].get("message", ""))
        return f"{name}: {' '.join(filter(None, said))}"
    if job["spec"].get("suspend"):
        return f"{name} is suspended: its queue has not admitted it"
    status = job.get("status", {})
    counts = (f"{status.get(word, 0)} {word}" for word in ("active", "ready", "failed"))
    return f"{name}: pods {', '.join(counts)}"


def _host(index: int, pod: Item | None, job: _JobState, spec: KubernetesSpec) -> HostRecord:
    name = f"{spec.pod_prefix}-{index}"
    if pod is None:
        status = "ended" if job.is_done_with(index) else "pending"
        return HostRecord(index, name, "", status, "" if job.is_over else "no pod yet")
    node = pod["spec"].get("nodeName")
    name = pod["metadata"]["name"] + (f" on {node}" if node else "")
    if not _is_live(pod):
        returns = job.may_return and not job.is_done_with(index)
        said = f"{_last_words(pod)}; Kubernetes starts another" if returns else _last_words(pod)
        return HostRecord(index, name, "", "pending" if returns else "ended", said)
    address = pod["status"].get("podIP", "")
    if any(condition["type"] == "Ready" for condition in _true(pod["status"])) and address:
        shown = f"[{address}]" if ":" in address else address
        return HostRecord(index, name, f"tcp://{shown}:{spec.port}", "running")
    return HostRecord(index, name, "", "pending", _why_pending(pod))


def _age_order(pod: Item) -> tuple[bool, str]:
    return _is_live(pod), pod["metadata"].get("creationTimestamp", "")


def _is_live(pod: Item) -> bool:
    phase = pod.get("status", {}).get("phase")
    return phase not in {"Succeeded", "Failed"} and "deletionTimestamp" not in pod["metadata"]


def _true(status: Mapping[str, Any]) -> list[Item]:
    return [condition for condition in status.get("conditions") or [] if condition["status"] == "True"]


def _why_pending(pod: Item) -> str:
    for container in pod["status"].get("containerStatuses") or []:
        waiting = container.get("state", {}).get("waiting")
        if waiting:
            return _joined(waiting.get("reason"), waiting.get("message"))
    for condition in pod["status"].get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] != "True":
            return _joined(condition.get("reason"), condition.get("message"))
    return f"{pod['status'].get('phase', 'Unknown')}, not ready yet"


def _last_words(pod: Item) -> str:
    status = pod.get("status", {})
    if "deletionTimestamp" in pod["metadata"] and status.get("phase") not in {"Succeeded", "Failed"}:
        return "it is being deleted"
    words = [_joined(c.get("reason"), c.get("message")) for c in _true(status) if c["type"] == "DisruptionTarget"]
    for container in status.get("containerStatuses") or []:
        end = container.get("state", {}).get("terminated")
        if end:
            words.append(_joined(f"exit code {end['exitCode']}", end.get("reason")))
    return "; ".join(words) or _joined(status.get("reason"), status.get("message")) or str(status.get("phase"))


def _joined(*words: str | None) -> str:
    return ": ".join(filter(None, words))


def indices(text: str) -> frozenset[int]:
    """Return the numbers that ``text`` stands for, as Kubernetes writes them: ``1,3-5,7``."""
    return frozenset(_ranges(part.partition("-") for part in text.split(",") if part))


def _ranges(parts: Iterable[tuple[str, str, str]]) -> Iterable[int]:
    for first, _, last in parts:
        yield from range(int(first), int(last or first) + 1)
