"""Job files: YAML with the fields of a kind, Python with a variable ``job``; errors that say where, and what to do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.jobs import JobError
from danaus.runtime.jobs.job_file import is_job_file, read_job_file
from danaus.runtime.jobs.kinds import KINDS, class_of
from danaus.runtime.jobs.kubernetes_job import KubernetesJob
from danaus.runtime.jobs.local_job import LocalJob
from danaus.runtime.jobs.ray_job import RayJob

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("yaml", reason="no PyYAML: pip install 'danaus[jobs]'")

ENOUGH = {
    "kubernetes": {"image": "x:1"},
    "local": {},
    "ray": {},
    "slurm": {"nodes": 2},
    "ssh": {"hosts": ["node1"]},
}


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_written_as_yaml(kind: str, tmp_path: Path) -> None:
    lines = [f"kind: {kind}", "name: train", *(f"{name}: {value}" for name, value in ENOUGH[kind].items())]

    job = read_job_file(write(tmp_path, "\n".join(lines)))

    assert type(job) is class_of(kind)
    assert (job.kind, job.name) == (kind, "train")


def test_fields_of_all_types_arrive(tmp_path: Path) -> None:
    text = """
        kind: kubernetes
        image: registry.example/danaus:1
        hosts: 4
        gpus: 8
        cpu: 16
        preempt_s: 30
        labels: {team: a}
        pod:
          tolerations:
            - {key: nvidia.com/gpu, operator: Exists}
        replace_lost: 2
    """
    job = read_job_file(write(tmp_path, text))

    assert isinstance(job, KubernetesJob)
    assert (job.spec.hosts, job.spec.gpus, job.spec.cpu, job.spec.preempt_s) == (4, 8, "16", 30)
    assert job.spec.labels == {"team": "a"}
    assert job.spec.pod["tolerations"][0]["operator"] == "Exists"
    assert (job.name, job.spec.replace_lost) == ("kubernetes", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: local\nhost: 2", "job.yaml:2: `host` is no field of a local job, did you mean `hosts`?"),
        ("kind: local\nzzz: 2", "job.yaml:2: `zzz` is no field of a local job: expected detached, hosts, name, "),
        ("kind: slrum\nnodes: 2", "job.yaml:1: 'slrum' is no kind of job, did you mean `slurm`?"),
        ("hosts: 2", "job.yaml: it lacks `kind`: one of kubernetes, local, ray, slurm, ssh"),
        ("kind: kubernetes", "job.yaml: a kubernetes job needs `image` too"),
        ("kind: local\nhosts: two", "job.yaml:2: `hosts` is 'two', expected a number"),
        ("kind: local\nhosts: true", "job.yaml:2: `hosts` is True, expected a number"),
        ("kind: ssh\nhosts: node1", "job.yaml:2: `hosts` is 'node1', expected a list, each text (in quotes)"),
        (
            "kind: ray\nresources: {CPU: x}",
            "job.yaml:2: `resources` is {'CPU': 'x'}, expected a mapping to a number or",
        ),
        ("kind: local\nhosts: 0", "job.yaml: LocalJob(hosts=0): expected a number of hosts, 1 or more"),
        ("kind: local\nhosts: 1\nhosts: 2", "job.yaml:3: `hosts` is there twice"),
        ("- 1", "job.yaml: expected fields, as `kind: local` on the first line"),
        ("kind: [", "job.yaml: no YAML: "),
        ("", "job.yaml: expected fields"),
    ],
)
def test_what_is_wrong_is_told_with_file_line_and_remedy(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as raised:
        read_job_file(write(tmp_path, text))

    assert str(raised.value).removeprefix(f"{tmp_path}/").startswith(said)


def test_python_is_run_and_finds_what_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "COUNT = 3", "settings_of_my_job.py")
    text = "from danaus.runtime.jobs.local_job import LocalJob\nfrom settings_of_my_job import COUNT\n"

    job = read_job_file(write(tmp_path, f"{text}job = LocalJob(hosts=COUNT, name='mine')", "job.py"))

    assert isinstance(job, LocalJob)
    assert (job.spec.hosts, job.name) == (3, "mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "no variable `job`"),
        ("job = 1", "`job` is of type int"),
        ("1 / 0", "it raised ZeroDivisionError: division by zero"),
    ],
)
def test_python_that_is_no_job_file_is_told(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=said):
        read_job_file(write(tmp_path, text, "job.py"))


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"ends in \.yaml or \.yml"):
        read_job_file(tmp_path / "job.toml")
    with pytest.raises(JobError, match=r"cannot be read: No such file"):
        read_job_file(tmp_path / "job.yaml")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(JobError, match=r"cannot be read: Is a directory"):
        read_job_file(tmp_path / "folder.py")


def test_without_pyyaml_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)

    with pytest.raises(JobError, match=r"pip install 'danaus\[jobs\]'"):
        read_job_file(write(tmp_path, "kind: local"))


def test_yaml_makes_nothing_but_data(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    with pytest.raises(JobError, match="no YAML"):
        read_job_file(write(tmp_path, f"kind: !!python/object/apply:os.system ['touch {mark}']"))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "expected"), [("job.yaml", True), ("a/job", True), ("job.py", True), ("train", False), ("v1.2", False)]
)
def test_files_and_names_of_jobs_are_told_apart(text: str, expected: Any) -> None:
    assert is_job_file(text) is expected


def test_a_ray_job_takes_whole_numbers_as_amounts(tmp_path: Path) -> None:
    job = read_job_file(write(tmp_path, "kind: ray\nresources: {CPU: 4, GPU: 0.5}"))

    assert isinstance(job, RayJob)
    assert job.spec.resources == {"CPU": 4.0, "GPU": 0.5}
