"""Words of a report: what happened, to whom, what followed, how it was repaired. Pure text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final, TypeVar

from ..failure import FailureKind, MeshFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

_T = TypeVar("_T")
_MAX_HOSTS: Final = 4
_MAX_LOG_LINES: Final = 5
"""Beside a traceback; else all that were kept are shown, since they may hold the stack of a crash."""

_PLURAL: Final = (
    ("was ", "were "),
    ("is ", "are "),
    ("has ", "have "),
    (" it does ", " they do "),
    (" its ", " their "),
)


@dataclass(frozen=True, slots=True)
class Repair:
    """A rank is up again."""

    failure: MeshFailure
    incarnation: int
    after_s: float


Followers = list[tuple[int, MeshFailure]]
Notes = list[tuple[MeshFailure, str]]


def block_text(roots: list[MeshFailure], followers: Followers, notes: Notes, repairs: list[Repair]) -> str:
    """The whole story of a root cause that befell one rank or several alike."""
    first = roots[0]
    lines = [f"{names(roots)} ({_where(roots)}) {_how(roots)}"]
    if first.detail:
        lines += _indented(first.detail.splitlines())
    if first.traceback:
        title = "stacks of its threads" if first.kind is FailureKind.STUCK else "remote traceback"
        lines += _section(title + _of(roots), first.traceback.rstrip().splitlines())
    if first.log_tail:
        kept = first.log_tail[-_MAX_LOG_LINES:] if first.traceback else first.log_tail
        lines += _section(
            ("last lines" if len(roots) > 1 else "its last lines") + _of(roots), [f"| {line}" for line in kept]
        )
    lines += _short_section("what followed", _follower_lines(followers))
    lines += _short_section("what was done", [*_repair_lines(repairs, roots), *_note_lines(notes, roots)])
    return "\n".join(lines)


def late_texts(
    name: str, alike: list[MeshFailure], followers: Followers, notes: Notes, repairs: list[Repair]
) -> list[str]:
    """One line for each thing heard after the block of ``name`` was printed."""
    texts = [f"{names(group)} ({_where(group)}) {_how(group)}, as {name} before" for group in _grouped(alike, _words)]
    texts += [f"{line.lstrip()}, which follows from {name}" for line in _follower_lines(followers)]
    return [*texts, *_repair_lines(repairs, []), *_note_lines(notes, [])]


def names(failures: Sequence[MeshFailure]) -> str:
    """The failed ranks of one mesh: ``mesh 'trainers' ranks 0-2, 5``, ``all 8 ranks of mesh 'trainers'``."""
    first = failures[0]
    if len(failures) == 1:
        return first.who
    again = f" (incarnation {first.incarnation})" if first.incarnation and _is_one(failures, _incarnation) else ""
    return _ranks(failures) + again


def mesh_size(failure: MeshFailure) -> int:
    """Ranks of the failure's mesh, where its dimensions are known; else 1."""
    return math.prod(size for _, size in failure.dims)


def _ranks(failures: Sequence[MeshFailure]) -> str:
    first = failures[0]
    ranks = sorted({failure.rank for failure in failures if failure.rank is not None})
    if len(ranks) == mesh_size(first) > 1:
        return f"all {len(ranks)} ranks of mesh {first.mesh!r}"
    return f"mesh {first.mesh!r}" + (f" rank{_s(ranks)} {_spans(ranks)}" if ranks else "")


def _where(failures: Sequence[MeshFailure]) -> str:
    """Host and process of the failed, and the coordinates of one."""
    first = failures[0]
    point = first.point if len(failures) == 1 and len(first.dims) > 1 else None
    parts = [f"{label}={place}" for label, place in point.items()] if point else []
    hosts = list(dict.fromkeys(failure.host for failure in failures))
    more = f" and {len(hosts) - _MAX_HOSTS} more" if len(hosts) > _MAX_HOSTS else ""
    parts.append(f"host{_s(hosts)} {', '.join(hosts[:_MAX_HOSTS])}{more}")
    pids = sorted({failure.pid for failure in failures if failure.pid})
    if pids and len(hosts) == 1:
        parts.append(f"pid{_s(pids)} {_spans(pids)}")
    return ", ".join(parts)


def _how(failures: Sequence[MeshFailure]) -> str:
    how = failures[0].how
    if len(failures) > 1:
        for one, many in _PLURAL:
            how = many + how.removeprefix(one) if how.startswith(one) else how
            how = how.replace(one, many) if one.startswith(" ") else how
    return how


def _of(roots: Sequence[MeshFailure]) -> str:
    return f" (rank {roots[0].rank})" if len(roots) > 1 else ""


def _follower_lines(followers: Followers) -> list[str]:
    depths = {id(failure): depth for depth, failure in followers}
    groups = _grouped([failure for _, failure in followers], lambda failure: (depths[id(failure)], _words(failure)))
    return [f"{'  ' * depths[id(group[0])]}{names(group)} {_how(group)}" for group in groups]


def _repair_lines(repairs: list[Repair], roots: Sequence[MeshFailure]) -> list[str]:
    lines: list[str] = []
    for group in _grouped(repairs, lambda repair: (repair.failure.mesh, repair.incarnation)):
        took = _took([repair.after_s for repair in group])
        who = _subject([repair.failure for repair in group], roots)
        lines.append(f"{who}started again as incarnation {group[0].incarnation} after {took}")
    return lines


def _note_lines(notes: Notes, roots: Sequence[MeshFailure]) -> list[str]:
    lines: list[str] = []
    for group in _grouped(notes, lambda note: (note[0].mesh, note[1])):
        who = _subject([failure for failure, _ in group], roots)
        lines.append(f"{who.rstrip()}: {group[0][1]}" if who else group[0][1])
    return lines


def _subject(failures: list[MeshFailure], roots: Sequence[MeshFailure]) -> str:
    """Who a line is about, with a space; nothing where that is what the block is about."""
    if {(each.mesh, each.rank) for each in failures} == {(root.mesh, root.rank) for root in roots}:
        return ""
    return f"{_ranks(failures)} "


def _grouped(items: Iterable[_T], by: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Items that ``by`` gives the same, each group where its first was."""
    groups: dict[Hashable, list[_T]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return list(groups.values())


def _words(failure: MeshFailure) -> Hashable:
    return failure.mesh, failure.kind, failure.how


def _incarnation(failure: MeshFailure) -> Hashable:
    return failure.incarnation


def _is_one(failures: Iterable[MeshFailure], by: Callable[[MeshFailure], Hashable]) -> bool:
    return len({by(failure) for failure in failures}) == 1


def _took(times_s: list[float]) -> str:
    low, high = min(times_s), max(times_s)
    if high < 1:
        return (
            f"{low * 1e3:.0f} ms"
            if round(low * 1e3) == round(high * 1e3)
            else f"{low * 1e3:.0f} to {high * 1e3:.0f} ms"
        )
    return f"{high:.1f} s" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f} s"


def _spans(numbers: Sequence[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    spans: list[str] = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        spans.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(spans)


def _s(things: Sequence[object]) -> str:
    return "s" if len(things) > 1 else ""


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"  {title}:", *_indented(_indented(lines))] if lines else []


def _short_section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"  {title}: {lines[0]}"] if len(lines) == 1 else _section(title, lines)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
