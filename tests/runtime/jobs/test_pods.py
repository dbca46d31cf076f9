"""How the state of hosts is read from what Kubernetes says of a Job and its pods."""

from __future__ import annotations

from typing import Any

import pytest

from danaus.runtime.jobs.manifests import INDEX_ANNOTATION, KubernetesSpec
from danaus.runtime.jobs.pods import read

SPEC = KubernetesSpec(name="train", image="x:1", hosts=1)
READY = {"type": "Ready", "status": "True"}


def make_job(*, retries: int = 1, suspend: bool = False, **status: Any) -> dict[str, Any]:
    spec = {"backoffLimitPerIndex": retries, "suspend": suspend}
    return {"kind": "Job", "metadata": {"name": "train"}, "spec": spec, "status": status}


def make_pod(
    phase: str, *, name: str = "train-0-x", born: str = "1", deleted: bool = False, **status: Any
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "annotations": {INDEX_ANNOTATION: "0"}, "creationTimestamp": born}
    metadata |= {"deletionTimestamp": "2"} if deleted else {}
    return {"kind": "Pod", "metadata": metadata, "spec": {"nodeName": "node7"}, "status": {"phase": phase, **status}}


def ended(code: int, reason: str) -> list[dict[str, Any]]:
    return [{"state": {"terminated": {"exitCode": code, "reason": reason}}}]


def waiting(reason: str, message: str) -> list[dict[str, Any]]:
    return [{"state": {"waiting": {"reason": reason, "message": message}}}]


DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
FAILED = make_pod("Failed", containerStatuses=ended(137, "OOMKilled"))
UNSCHEDULED = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPUs left"}


@pytest.mark.parametrize(
    ("items", "status", "detail"),
    [
        ([make_job()], "pending", "no pod yet"),
        ([], "ended", ""),
        ([make_job(), make_pod("Pending", conditions=[UNSCHEDULED])], "pending", "Unschedulable: no GPUs left"),
        (
            [make_job(), make_pod("Pending", containerStatuses=waiting("ImagePullBackOff", "no such image"))],
            "pending",
            "ImagePullBackOff: no such image",
        ),
        ([make_job(), make_pod("Running", podIP="10.0.0.1")], "pending", "Running, not ready yet"),
        ([make_job(), make_pod("Running", podIP="10.0.0.1", conditions=[READY])], "running", ""),
        ([make_job(), FAILED], "pending", "exit code 137: OOMKilled; Kubernetes starts another"),
        ([make_job(retries=0), FAILED], "ended", "exit code 137: OOMKilled"),
        ([make_job(failedIndexes="0"), FAILED], "ended", "exit code 137: OOMKilled"),
        (
            [make_job(completedIndexes="0"), make_pod("Succeeded", containerStatuses=ended(0, "Completed"))],
            "ended",
            None,
        ),
        ([make_job(), make_pod("Failed", conditions=[DISRUPTED])], "pending", None),
        ([make_job(), make_pod("Running", deleted=True)], "pending", "it is being deleted; Kubernetes starts another"),
        ([make_job(retries=0), make_pod("Running", deleted=True)], "ended", "it is being deleted"),
        ([make_job(), make_pod("Failed", reason="Evicted", message="disk full")], "pending", None),
    ],
)
def test_a_host_is_what_its_newest_pod_is(items: list[dict[str, Any]], status: str, detail: str | None) -> None:
    [host] = read(items, SPEC).hosts

    assert host.status == status
    if detail is not None:
        assert host.detail == detail


def test_the_pod_that_lives_counts_before_those_that_were() -> None:
    pods = [
        make_pod("Failed", name="train-0-a", born="3"),
        make_pod("Running", name="train-0-b", born="2", podIP="10.0.0.2", conditions=[READY]),
    ]

    seen = read([make_job(), *pods], SPEC)

    assert seen.pods == ["train-0-b"]
    assert (seen.hosts[0].name, seen.hosts[0].address) == ("train-0-b on node7", "tcp://10.0.0.2:26600")


def test_an_address_of_ipv6_is_written_in_brackets() -> None:
    [host] = read([make_job(), make_pod("Running", podIP="fd00::1", conditions=[READY])], SPEC).hosts

    assert host.address == "tcp://[fd00::1]:26600"


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (make_job(suspend=True), "job train is suspended: its queue has not admitted it"),
        (make_job(active=1, ready=0), "job train: pods 1 active, 0 ready, 0 failed"),
        (
            make_job(
                conditions=[{"type": "Failed", "status": "True", "reason": "FailedIndexes", "message": "1 failed"}]
            ),
            "job train: failed FailedIndexes 1 failed",
        ),
    ],
)
def test_the_job_says_how_it_is(job: dict[str, Any], said: str) -> None:
    assert read([job], SPEC).detail == said


def test_every_host_is_told_of_even_without_a_pod() -> None:
    seen = read([make_job()], KubernetesSpec(name="train", image="x:1", hosts=3))

    assert [host.index for host in seen.hosts] == [0, 1, 2]
    assert seen.pods == ["", "", ""]
