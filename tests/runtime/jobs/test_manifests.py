"""What a job on Kubernetes is made of, checked against Kubernetes' own schemas."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.jobs.kubernetes_job import KubernetesJob
from danaus.runtime.jobs.manifests import KubernetesSpec, manifests, merged
from danaus.runtime.jobs.pods import indices
from danaus.runtime.network.keys import create_key_file, read_key_file

if TYPE_CHECKING:
    from pathlib import Path

NEWEST, OLDEST = "1.37", "1.29"
KEY = "k" * 40
SCHEMAS = "no Kubernetes schemas: pip install kubernetes-validate"


def make_job(**fields: Any) -> KubernetesJob:
    wanted: dict[str, Any] = {"name": "train", "image": "registry.example/danaus:1", "hosts": 2, **fields}
    return KubernetesJob(**wanted)


def make_spec(**fields: Any) -> KubernetesSpec:
    wanted: dict[str, Any] = {"name": "train", "image": "registry.example/danaus:1", "hosts": 4, **fields}
    return KubernetesSpec(**wanted)


def pod_of(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[-1]["spec"]["template"]["spec"]


def test_every_manifest_is_what_kubernetes_schemas_allow() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason=SCHEMAS)
    spec = make_spec(
        gpus=8,
        cpu="16",
        memory="64Gi",
        labels={"team": "a"},
        node_selector={"gpu": "h100"},
        service_account="trainer",
        run_as_user=1000,
        env={"NCCL_DEBUG": "INFO"},
        replace_lost=3,
        pod={"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]},
        container={"imagePullPolicy": "Always"},
    )
    for made in (manifests(make_spec(), key=None), manifests(spec, key=KEY, job_id="0123")):
        assert [item["kind"] for item in made] == ["Secret", "Service", "Job"]
        for item in made:
            for version in (OLDEST, NEWEST):
                validator.validate(item, version, strict=True)


def test_the_schemas_would_find_a_mistake() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason=SCHEMAS)
    job = manifests(make_spec(), key=None)[-1]
    job["spec"]["completionMod"] = "Indexed"

    with pytest.raises(validator.ValidationError):
        validator.validate(job, NEWEST, strict=True)


def test_a_jobset_holds_the_same_job_and_the_fields_that_its_operator_knows() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason=SCHEMAS)
    secret, jobset = manifests(make_spec(jobset=True), key=None)

    validator.validate(secret, NEWEST, strict=True)
    replicated = jobset["spec"]["replicatedJobs"][0]
    head = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
    validator.validate(merged(head, {"metadata": {"name": "train-hosts-0"}}), NEWEST, strict=True)
    assert set(jobset["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert set(jobset["spec"]["network"]) == {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert set(replicated) == {"name", "replicas", "template"}
    assert make_spec(jobset=True).host_name(3) == "train-hosts-0-3.train.default.svc"


def test_a_pod_that_is_lost_comes_back_under_its_index() -> None:
    job = manifests(make_spec(replace_lost=3), key=None)[-1]["spec"]

    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    assert (job["backoffLimitPerIndex"], job["podReplacementPolicy"]) == (3, "Failed")
    assert job["podFailurePolicy"]["rules"][0]["action"] == "Ignore"
    assert pod_of([{"spec": job}])["restartPolicy"] == "Never"


def test_without_replacements_a_disruption_ends_the_host() -> None:
    job = manifests(make_spec(), key=None)[-1]["spec"]

    assert job["backoffLimitPerIndex"] == 0
    assert job["podFailurePolicy"]["rules"][0]["action"] == "FailIndex"


def test_each_index_has_a_name_that_the_service_publishes() -> None:
    _, service, job = manifests(make_spec(namespace="ml"), key=None)

    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["metadata"]["name"] == pod_of([job])["subdomain"] == "train"
    selector = service["spec"]["selector"].items()
    assert selector <= job["spec"]["template"]["metadata"]["labels"].items()
    assert make_spec(namespace="ml").host_name(3) == "train-3.train.ml.svc"


def test_the_key_is_a_private_file_and_nothing_else() -> None:
    secret, service, job = manifests(make_spec(), key=KEY)
    pod = pod_of([job])

    assert base64.b64decode(secret["data"]["key"]).decode() == KEY
    rest = json.dumps([service, job])
    assert KEY not in rest
    assert secret["data"]["key"] not in rest
    volume = pod["volumes"][0]["secret"]
    assert (volume["defaultMode"], volume["items"][0]["mode"]) == (0o400, 0o400)
    assert pod["containers"][0]["volumeMounts"][0] == {"name": "key", "mountPath": "/etc/danaus", "readOnly": True}
    assert {item["name"] for item in pod["containers"][0]["env"]} == {
        "DANAUS_HOST_INDEX",
        "DANAUS_LOG_DIR",
        "DANAUS_POD_IP",
        "DANAUS_PREEMPT_S",
        "DANAUS_STATE_DIR",
    }


def test_other_users_than_root_get_a_private_copy_of_the_key(tmp_path: Path) -> None:
    pod = pod_of(manifests(make_spec(run_as_user=1000), key=None))

    assert pod["securityContext"]["fsGroup"] == 1000
    command = pod["containers"][0]["command"]
    mounted, copy = tmp_path / "mounted", tmp_path / "copy"
    mounted.mkdir()
    copy.mkdir()
    create_key_file(mounted / "key")
    # What Kubernetes makes of the file for the pod's group.
    (mounted / "key").chmod(0o440)
    words = [word.replace("/etc/danaus", str(mounted)).replace("/run/danaus", str(copy)) for word in command]
    subprocess.run([*words[:4], "true"], check=True, timeout=5)
    assert stat.S_IMODE((copy / "key").stat().st_mode) & 0o077 == 0
    assert len(read_key_file(copy / "key")) == 32
    assert words[-1] == str(copy / "key")


def test_a_pod_has_the_time_that_a_preemption_takes() -> None:
    pod = pod_of(manifests(make_spec(preempt_s=60), key=None))

    env = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    assert env["DANAUS_PREEMPT_S"] == "60"
    assert pod["terminationGracePeriodSeconds"] > 60


def test_users_lay_what_they_need_over_the_pods() -> None:
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists"}
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    pod = pod_of(manifests(make_spec(pod={"tolerations": [toleration], "volumes": [volume]}), key=None))

    assert pod["tolerations"] == [toleration]
    assert [item["name"] for item in pod["volumes"]] == ["key", "shm", "state", "data"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "Train_1"}, "lower-case"),
        ({"name": "a" * 48, "jobset": True, "hosts": 10_000_000}, "characters too long"),
        ({"namespace": "-x"}, "lower-case"),
        ({"image": " "}, "REGISTRY/NAME:TAG"),
        ({"hosts": 0}, "expected 1 or more"),
        ({"port": 70_000}, "1 to 65535"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_at_once(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_job(**fields)


def test_render_shows_no_key_unless_it_is_given_one(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="no PyYAML: pip install pyyaml")
    create_key_file(tmp_path / "key")
    key = (tmp_path / "key").read_text(encoding="utf-8")

    hidden = list(yaml.safe_load_all(make_job().render()))
    shown = list(yaml.safe_load_all(make_job().render(key_file=tmp_path / "key")))

    assert hidden[0]["stringData"] == {"key": "<redacted>"}
    assert base64.b64decode(shown[0]["data"]["key"]).decode() == key
    assert hidden[1:] == shown[1:]


@pytest.mark.parametrize(("text", "expected"), [("", set()), ("3", {3}), ("1,3-5,7", {1, 3, 4, 5, 7})])
def test_indices_are_read_as_kubernetes_writes_them(text: str, expected: set[int]) -> None:
    assert indices(text) == expected
