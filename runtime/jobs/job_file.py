"""Reads a job from a file: YAML with the fields of its kind, or Python with a variable ``job``.

.. code-block:: yaml

    kind: ssh
    name: train
    hosts: [node1, node2]
"""

from __future__ import annotations

import difflib
import inspect
import runpy
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .errors import JobError
from .job import Job
from .kinds import KINDS, class_of

if TYPE_CHECKING:
    from collections.abc import Iterable

YAML_SUFFIXES: Final = (".yaml", ".yml")
MAX_BYTES: Final = 1 << 20


def is_job_file(text: str) -> bool:
    """Whether ``text`` names a file rather than a running job."""
    return text.endswith((".py", *YAML_SUFFIXES)) or "/" in text


def read_job_file(path: str | Path) -> Job[Any]:
    """Return the job that a file describes; starts nothing.

    Args:
        path: A file that ends in ``.yaml``, ``.yml`` or ``.py``.

    Raises:
        JobError: It cannot be read, or something in it is wrong: the message names file, line, field and remedy.
    """
    path = Path(path)
    if path.suffix == ".py":
        return _run(path)
    if path.suffix in YAML_SUFFIXES:
        return _Yaml(path).job()
    raise JobError(f"{path}: a job file ends in .yaml or .yml, or in .py for a script with a variable `job`")


def _run(path: Path) -> Job[Any]:
    _check_readable(path)
    # As for a script: what lies beside it can be imported.
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        variables = runpy.run_path(str(path), run_name="__danaus_job__")
    except Exception as error:
        raise JobError(f"{path}: it raised {type(error).__name__}: {error}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    if "job" not in variables:
        raise JobError(f"{path}: no variable `job`: end it with a line as job = LocalJob(hosts=2, detached=True)")
    job = variables["job"]
    if not isinstance(job, Job):
        raise JobError(f"{path}: `job` is of type {type(job).__name__}, not a job as LocalJob or SlurmJob")
    return job


def _check_readable(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise JobError(f"{path}: it cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise JobError(f"{path}: more than {MAX_BYTES} bytes, which is no job file")
    return content


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a kind of job."""

    hint: Any
    is_required: bool


class _Yaml:
    """One YAML file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, int] = {}

    def job(self) -> Job[Any]:
        fields = self._read()
        kind = fields.pop("kind", None)
        if kind is None:
            raise self._error(None, f"it lacks `kind`: one of {', '.join(KINDS)}")
        if kind not in KINDS:
            raise self._error("kind", f"{kind!r} is no kind of job{_nearest(str(kind), KINDS)}")
        known = _fields_of(kind)
        self._check_names(kind, fields, known)
        for name, value in fields.items():
            if not _fits(value, known[name].hint):
                raise self._error(name, f"`{name}` is {value!r}, expected {_shown(known[name].hint)}")
        try:
            return class_of(kind)(**fields)
        except (TypeError, ValueError) as error:
            raise JobError(f"{self._path}: {error}") from error

    def _check_names(self, kind: str, fields: Mapping[str, Any], known: Mapping[str, _Field]) -> None:
        for name in fields:
            if name not in known:
                raise self._error(name, f"`{name}` is no field of a {kind} job{_nearest(name, known)}")
        missing = [name for name, field in known.items() if field.is_required and name not in fields]
        if missing:
            raise self._error(None, f"a {kind} job needs `{'`, `'.join(missing)}` too")

    def _read(self) -> dict[str, Any]:
        content = _check_readable(self._path)
        try:
            import yaml
        except ImportError as error:
            raise JobError(
                f"{self._path}: YAML is read with PyYAML: pip install 'danaus[jobs]', or write the job in Python"
            ) from error
        try:
            node = yaml.compose(content, Loader=yaml.SafeLoader)
            fields = yaml.safe_load(content)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise JobError(f"{self._path}: no YAML: {error}") from error
        if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
            raise self._error(None, "expected fields, as `kind: local` on the first line and `hosts: 2` on the next")
        for key, _ in node.value:
            name = key.value
            if name in self._lines:
                raise JobError(f"{self._path}:{key.start_mark.line + 1}: `{name}` is there twice")
            self._lines[name] = key.start_mark.line + 1
        return fields

    def _error(self, name: str | None, reason: str) -> JobError:
        line = f":{self._lines[name]}" if name in self._lines else ""
        return JobError(f"{self._path}{line}: {reason}")


def _fields_of(kind: str) -> dict[str, _Field]:
    constructor = class_of(kind).__init__
    module = sys.modules[constructor.__module__]
    # Some names are there for type checkers only.
    names = {**vars(module), "Sequence": Sequence, "Mapping": Mapping}
    hints = typing.get_type_hints(constructor, globalns=names)
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: _Field(hints.get(p.name, Any), p.default is p.empty) for p in parameters if p.name != "self"}


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean `{near[0]}`?" if near else f": expected {', '.join(known)}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value``, as YAML gives it, is of the type that ``hint`` says; what is not known here, is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return any(_fits(value, option) for option in arguments)
    if origin in {list, tuple, Sequence}:
        item = (*arguments, Any)[0]
        return isinstance(value, list) and all(_fits(each, item) for each in value)
    if origin in {dict, Mapping}:
        key, item = (*arguments, Any, Any)[:2]
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if hint in {int, float}:
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    # Any is a class as well.
    return isinstance(value, hint) if isinstance(hint, type) and hint is not Any else True


def _shown(hint: Any) -> str:
    words = {int: "a number", float: "a number", str: "text (in quotes)", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(dict.fromkeys(_shown(option) for option in arguments))
    if origin in {list, tuple, Sequence}:
        return f"a list, each {_shown(arguments[0])}" if arguments else "a list"
    if origin in {dict, Mapping}:
        return f"a mapping to {_shown(arguments[1])}" if arguments and arguments[1] is not Any else "a mapping"
    return str(hint)
