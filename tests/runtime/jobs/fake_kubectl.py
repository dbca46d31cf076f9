"""Stands for kubectl and the cluster behind it: records what it is given and keeps the cluster's state in a folder.

It does what the Job controller, the scheduler and the kubelet do for indexed Jobs, as far as a job of ours depends on
it: pods with indices and addresses of 127/8, readiness, retries per index, deletion by selector. With ``run`` in the
cluster's settings it runs the containers' commands as processes of this machine, with the Secret mounted as a file.
No real cluster was at hand to compare it with.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

INDEX = "batch.kubernetes.io/job-completion-index"
KINDS = {
    "jobs": "Job",
    "pods": "Pod",
    "pod": "Pod",
    "services": "Service",
    "secrets": "Secret",
    "jobsets.jobset.x-k8s.io": "JobSet",
}

Item = dict[str, Any]


class Cluster:
    """The cluster's objects, in one file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "cluster.json"
        self.settings: Item = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else "[]"
        self.items: list[Item] = json.loads(text)

    def save(self) -> None:
        # Whole at any moment, since tests look at it.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.items, indent=1), encoding="utf-8")
        new.rename(self.path)

    def find(self, kind: str, name: str | None = None, labels: dict[str, str] | None = None) -> list[Item]:
        return [
            item
            for item in self.items
            if item["kind"] == kind
            and name in {None, item["metadata"]["name"]}
            and (labels or {}).items() <= item["metadata"].get("labels", {}).items()
        ]

    def create(self, item: Item) -> str:
        kind, name = item["kind"], item["metadata"]["name"]
        if kind == "JobSet" and not self.settings.get("jobset", True):
            return f'error: resource mapping not found for name: "{name}": no matches for kind "JobSet"'
        if self.find(kind, name):
            return f'Error from server (AlreadyExists): {kind.lower()}s "{name}" already exists'
        item["metadata"]["uid"] = f"uid-{len(self.items)}-{name}"
        self.items.append(item)
        if kind == "JobSet":
            replicated = item["spec"]["replicatedJobs"][0]
            job = replicated["template"]
            job_name = f"{name}-{replicated['name']}-0"
            metadata = {**job["metadata"], "name": job_name, "uid": f"uid-{job_name}", "ownerJobSet": name}
            self.items.append({"kind": "Job", "metadata": metadata, "spec": job["spec"]})
        return ""

    def reconcile(self) -> None:
        """Do what the controllers would have done meanwhile."""
        for job in self.find("Job"):
            self._reconcile_job(job)
        for pod in self.find("Pod"):
            self._reconcile_pod(pod)

    def _reconcile_job(self, job: Item) -> None:
        status = job.setdefault("status", {"failed": 0})
        failed, completed = set(status.get("failedList", [])), set(status.get("completedList", []))
        pods = [pod for pod in self.find("Pod") if pod["ownerJob"] == job["metadata"]["name"]]
        for index in range(job["spec"]["completions"]):
            mine = [pod for pod in pods if pod["metadata"]["annotations"][INDEX] == str(index)]
            counted = [pod for pod in mine if pod["status"]["phase"] == "Failed" and not _disrupted(pod)]
            if any(pod["status"]["phase"] == "Succeeded" for pod in mine):
                completed.add(index)
            elif any(pod["status"]["phase"] in {"Pending", "Running"} for pod in mine):
                continue
            elif len(counted) > job["spec"]["backoffLimitPerIndex"] or self._fails_index(job, mine):
                failed.add(index)
            else:
                self.items.append(self._new_pod(job, index, len(mine)))
        status["failedList"], status["completedList"] = sorted(failed), sorted(completed)
        status["failedIndexes"] = ",".join(map(str, sorted(failed)))
        status["completedIndexes"] = ",".join(map(str, sorted(completed)))
        if len(failed | completed) == job["spec"]["completions"]:
            kind = "Failed" if failed else "Complete"
            status["conditions"] = [{"type": kind, "status": "True", "reason": "FailedIndexes" if failed else ""}]

    def _fails_index(self, job: Item, pods: list[Item]) -> bool:
        action = job["spec"]["podFailurePolicy"]["rules"][0]["action"]
        return action == "FailIndex" and any(_disrupted(pod) for pod in pods)

    def _new_pod(self, job: Item, index: int, tries: int) -> Item:
        template = job["spec"]["template"]
        count = 1 + sum(item["kind"] == "Pod" for item in self.items)
        return {
            "kind": "Pod",
            "ownerJob": job["metadata"]["name"],
            "metadata": {
                "name": f"{job['metadata']['name']}-{index}-{'bcdfg'[tries % 5]}{count:04d}",
                "namespace": template["metadata"].get("namespace", "default"),
                "uid": f"uid-{count}",
                "labels": dict(template["metadata"]["labels"]),
                "annotations": {INDEX: str(index)},
                "creationTimestamp": f"2026-01-01T00:00:{count:02d}Z",
            },
            "spec": template["spec"],
            "status": {"phase": "Pending", "ip": f"{self.settings['subnet']}.{count}"},
        }

    def _reconcile_pod(self, pod: Item) -> None:
        status = pod["status"]
        if status["phase"] in {"Succeeded", "Failed"}:
            return
        if pod["metadata"]["name"].split("-")[-2] in self.settings.get("unschedulable", []):
            message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
            reason = {"reason": "Unschedulable", "message": message}
            status["conditions"] = [{"type": "PodScheduled", "status": "False", **reason}]
            return
        if status["phase"] == "Pending":
            pod["spec"] = {**pod["spec"], "nodeName": f"node-{status['ip'].rpartition('.')[2]}"}
            status["phase"], status["podIP"] = "Running", status["ip"]
            self._run(pod)
        ready = self._is_ready(pod)
        status["conditions"] = [{"type": "Ready", "status": str(ready)}]
        ended = self.folder / "pods" / pod["metadata"]["name"] / "code"
        if ended.exists():
            fail(pod, int(ended.read_text(encoding="utf-8")))

    def _run(self, pod: Item) -> None:
        if not self.settings.get("run"):
            return
        folder = self.folder / "pods" / pod["metadata"]["name"]
        folder.mkdir(parents=True)
        (folder / "pod.json").write_text(json.dumps(pod), encoding="utf-8")
        secret_name = pod["spec"]["volumes"][0]["secret"]["secretName"]
        key = base64.b64decode(self.find("Secret", secret_name)[0]["data"]["key"])
        handle = os.open(folder / "key", os.O_CREAT | os.O_WRONLY, 0o400)
        os.write(handle, key)
        os.close(handle)
        # No child of ours, which may be the test itself.
        detach = '"$@" </dev/null >/dev/null 2>&1 &'
        command = ["sh", "-c", detach, "sh", sys.executable, __file__, "kubelet", str(folder)]
        subprocess.run(command, check=True, start_new_session=True)

    def _is_ready(self, pod: Item) -> bool:
        if not self.settings.get("run"):
            return True
        port = pod["spec"]["containers"][0]["readinessProbe"]["tcpSocket"]["port"]
        with contextlib.suppress(OSError), socket.create_connection((pod["status"]["podIP"], port), timeout=1):
            return True
        return False

    def delete(self, items: list[Item], *, grace_s: float | None) -> None:
        names = {item["metadata"]["name"] for item in items}
        items = [*items, *(job for job in self.find("Job") if job["metadata"].get("ownerJobSet") in names)]
        jobs = {item["metadata"]["name"] for item in items if item["kind"] == "Job"}
        pods = [pod for pod in self.find("Pod") if pod in items or pod["ownerJob"] in jobs]
        for pod in pods:
            self._stop(pod, grace_s)
        for item in [*items, *pods]:
            # The Job still counts a pod of its own that was deleted.
            if item in self.items and (item["kind"] != "Pod" or item["ownerJob"] in jobs):
                self.items.remove(item)

    def _stop(self, pod: Item, grace_s: float | None) -> None:
        folder = self.folder / "pods" / pod["metadata"]["name"]
        wait_until = time.monotonic() + 10
        while folder.exists() and not (folder / "pid").exists() and time.monotonic() < wait_until:
            time.sleep(0.01)
        if (folder / "pid").exists() and not (folder / "code").exists():
            limit_s = pod["spec"]["terminationGracePeriodSeconds"] if grace_s is None else grace_s
            pid = int((folder / "pid").read_text(encoding="utf-8"))
            end_s = time.monotonic() + limit_s
            number = signal.SIGTERM
            while not (folder / "code").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    number = 0 if time.monotonic() < end_s else signal.SIGKILL
                time.sleep(0.01)
        if pod["status"]["phase"] not in {"Succeeded", "Failed"}:
            code = (folder / "code").read_text(encoding="utf-8") if (folder / "code").exists() else "143"
            fail(pod, int(code))


def fail(pod: Item, code: int) -> None:
    pod["status"]["phase"] = "Failed" if code else "Succeeded"
    reason = "Error" if code else "Completed"
    pod["status"]["conditions"] = []
    pod["status"]["containerStatuses"] = [{"state": {"terminated": {"exitCode": code, "reason": reason}}}]


def _disrupted(pod: Item) -> bool:
    return bool(pod["status"].get("disrupted"))


def kubelet(folder: Path) -> None:
    """Run a pod's only container as a process of this machine, and keep its exit code."""
    pod = json.loads((folder / "pod.json").read_text(encoding="utf-8"))
    container = pod["spec"]["containers"][0]
    known = {
        f"metadata.annotations['{INDEX}']": pod["metadata"]["annotations"][INDEX],
        "status.podIP": pod["status"]["podIP"],
    }
    env = {
        item["name"]: item["value"] if "value" in item else known[item["valueFrom"]["fieldRef"]["fieldPath"]]
        for item in container["env"]
    }
    env = {name: value.replace("/var/lib/danaus", str(folder / "state")) for name, value in env.items()}
    words = [re.sub(r"\$\((\w+)\)", lambda match: env[match[1]], word) for word in container["command"]]
    words = [word.replace("0.0.0.0", pod["status"]["podIP"]) for word in words]
    words = [str(folder / "key") if word == "/etc/danaus/key" else word for word in words]
    command = [sys.executable, "-m", "danaus.tools.cli", *words[1:]] if words[0] == "danaus" else words
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        (folder / "pid.new").write_text(str(child.pid), encoding="utf-8")
        (folder / "pid.new").rename(folder / "pid")
        code = child.wait()
    (folder / "code.new").write_text(str(code if code >= 0 else 128 - code), encoding="utf-8")
    (folder / "code.new").rename(folder / "code")


def main(arguments: list[str]) -> int:
    if arguments[0] == "kubelet":
        kubelet(Path(arguments[1]))
        return 0
    folder = Path(os.environ["FAKE_CLUSTER"])
    stdin = sys.stdin.read() if "-" in arguments else ""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (folder / "calls.jsonl").open("a", encoding="utf-8") as calls:
            calls.write(json.dumps({"arguments": arguments, "stdin": stdin, "env": dict(os.environ)}) + "\n")
        cluster = Cluster(folder)
        if cluster.settings.get("unreachable"):
            print("Unable to connect to the server: dial tcp 192.0.2.1:443: i/o timeout", file=sys.stderr)
            return 1
        cluster.reconcile()
        code = run(cluster, arguments, stdin)
        cluster.reconcile()
        cluster.save()
        return code


def run(cluster: Cluster, arguments: list[str], stdin: str) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["create", "get", "delete", "logs"])
    parser.add_argument("what", nargs="?", default="")
    for short, name in (
        ("-c", "--container"),
        ("-f", "--filename"),
        ("-l", "--selector"),
        ("-o", "--output"),
        ("-n", "--namespace"),
    ):
        parser.add_argument(short, name)
    for name in ("--request-timeout", "--context", "--timeout", "--cascade", "--wait", "--tail"):
        parser.add_argument(name)
    parser.add_argument("--grace-period", type=float)
    parser.add_argument("--ignore-not-found", action="store_true")
    options = parser.parse_args(arguments)
    if options.verb == "create":
        problems = [problem for item in map(json.loads, stdin.splitlines()) if (problem := cluster.create(item))]
        print(*problems, sep="\n", file=sys.stderr)
        return 1 if problems else 0
    found = _chosen(cluster, options)
    if options.verb == "get":
        print(json.dumps({"kind": "List", "items": found}))
    elif options.verb == "logs":
        path = cluster.folder / "pods" / found[0]["metadata"]["name"] / "log"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        print(*lines[-int(options.tail) :], sep="\n")
    else:
        cluster.delete(found, grace_s=options.grace_period)
    return 0


def _chosen(cluster: Cluster, options: argparse.Namespace) -> list[Item]:
    labels = dict(pair.split("=") for pair in options.selector.split(",")) if options.selector else {}
    kinds, _, name = options.what.partition("/")
    return [item for kind in kinds.split(",") for item in cluster.find(KINDS[kind], name or None, labels)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
