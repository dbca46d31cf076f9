"""An API server that the real kubectl can talk to, before the cluster of ``fake_kubectl.py``.

It knows enough of the protocol for what a job does: discovery, create, list by label, get, delete, a pod's log. What is
created is checked against Kubernetes' own schemas, as a server does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from . import fake_kubectl

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

VERSION = "1.32"
GROUPS = {"api/v1": ["pods", "secrets", "services"], "apis/batch/v1": ["jobs"]}
JOBSET = {"apis/jobset.x-k8s.io/v1alpha2": ["jobsets"]}
KINDS = {**fake_kubectl.KINDS, "jobsets": "JobSet"}
_PATH = re.compile(
    r"/(?P<group>api/v1|apis/[^/]+/[^/]+)(/namespaces/[^/]+/(?P<resource>\w+)(/(?P<name>[^/]+)(/(?P<part>log))?)?)?"
)


class _Handler(BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        with self._cluster() as cluster:
            code, content = self._get(cluster)
        self._answer(code, content)

    def do_POST(self) -> None:
        item = json.loads(self._body())
        with self._cluster() as cluster:
            problem = _invalid(item) or cluster.create(item)
        if problem:
            reason, code = ("AlreadyExists", 409) if "already exists" in problem else ("Invalid", 422)
            self._answer(code, _status(code, reason, problem))
        else:
            self._answer(201, item)

    def do_DELETE(self) -> None:
        options = json.loads(self._body() or "{}")
        match = _PATH.fullmatch(urlsplit(self.path).path)
        assert match is not None
        with self._cluster() as cluster:
            found = cluster.find(KINDS[match["resource"]], match["name"])
            cluster.delete(found, grace_s=options.get("gracePeriodSeconds"))
        self._answer(200, _status(200, "", "") if found else _missing(match))

    def _get(self, cluster: fake_kubectl.Cluster) -> tuple[int, Any]:
        url = urlsplit(self.path)
        groups = {**GROUPS, **(JOBSET if cluster.settings.get("jobset", True) else {})}
        about = _discovery(url.path, groups)
        if about is not None:
            return 200, about
        match = _PATH.fullmatch(url.path)
        if match is None or match["group"] not in groups or match["resource"] is None:
            return 404, _status(404, "NotFound", "the server could not find the requested resource")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        pairs = [pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair]
        found = cluster.find(KINDS[match["resource"]], match["name"], dict(pairs))
        version = match["group"].partition("/")[2]
        found = [{"apiVersion": version, **item} for item in found]
        if match["name"] is None:
            return 200, {
                "kind": f"{KINDS[match['resource']]}List",
                "apiVersion": version,
                "metadata": {},
                "items": found,
            }
        if not found:
            return 404, _missing(match)
        if match["part"] is None:
            return 200, found[0]
        path = cluster.folder / "pods" / match["name"] / "log"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return 200, "".join(f"{line}\n" for line in lines[-int(query["tailLines"]) :])

    @contextlib.contextmanager
    def _cluster(self) -> Generator[fake_kubectl.Cluster]:
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cluster = fake_kubectl.Cluster(self.folder)
            cluster.reconcile()
            yield cluster
            cluster.reconcile()
            cluster.save()

    def _body(self) -> str:
        return self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()

    def _answer(self, code: int, content: Any) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        """Say nothing."""


def _discovery(path: str, groups: dict[str, list[str]]) -> dict[str, Any] | str | None:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        names = [name.split("/")[1:] for name in groups if name != "api/v1"]
        found = [(group, {"groupVersion": f"{group}/{version}", "version": version}) for group, version in names]
        listed = [{"name": group, "versions": [version], "preferredVersion": version} for group, version in found]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path == "/openapi/v2":
        # The older form, asked for kinds that are not in the newer one: an empty document of protocol buffers.
        return ""
    if path.startswith("/openapi/v3"):
        return _openapi(path.removeprefix("/openapi/v3").strip("/"), groups)
    group = path.strip("/")
    if group not in groups:
        return None
    resources = [
        {"name": name, "singularName": name[:-1], "namespaced": True, "kind": KINDS[name], "verbs": list(_VERBS)}
        for name in groups[group]
    ]
    return {"kind": "APIResourceList", "groupVersion": group.partition("/")[2], "resources": resources}


_VERBS = ("create", "delete", "get", "list", "watch")


def _openapi(group: str, groups: dict[str, list[str]]) -> dict[str, Any]:
    """Say that the server checks fields itself, without which kubectl would ask for every schema."""
    if not group:
        return {"paths": {name: {"serverRelativeURL": f"/openapi/v3/{name}"} for name in groups}}
    *_, group_name, version = ["", *group.split("/")[1:]]
    paths: dict[str, Any] = {}
    for name in groups[group]:
        kind = {"group": group_name, "kind": KINDS[name], "version": version}
        patch = {"parameters": [{"name": "fieldValidation", "in": "query"}], "x-kubernetes-group-version-kind": kind}
        paths[f"/{group}/namespaces/{{namespace}}/{name}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "fake", "version": VERSION}, "paths": paths}


def _invalid(item: dict[str, Any]) -> str:
    import kubernetes_validate

    if item["kind"] == "JobSet":
        # Its schema is its operator's.
        return ""
    try:
        kubernetes_validate.validate(item, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return ""


def _missing(match: re.Match[str]) -> dict[str, Any]:
    return _status(404, "NotFound", f'{match["resource"]} "{match["name"]}" not found')


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    status = "Success" if code < 300 else "Failure"
    return {"kind": "Status", "apiVersion": "v1", "status": status, "reason": reason, "message": message, "code": code}


@contextlib.contextmanager
def serving(folder: Path) -> Generator[str]:
    """Serve the cluster that is kept in ``folder``; yields the text of a kubeconfig."""
    handler = type("Handler", (_Handler,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            config = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                "users": [{"name": "fake", "user": {}}],
                "current-context": "fake",
            }
            yield json.dumps(config)
        finally:
            server.shutdown()
            thread.join()
