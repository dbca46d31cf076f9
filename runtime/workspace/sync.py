"""Sends the changed files of the working directory to hosts, so that an edit here is what runs there.

What is sent is a snapshot, which this host keeps: an edit meanwhile does not mix with it, and a host that takes the
place of a lost one gets what the others have, not what has become of the directory since.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ..calls.future import refuse_inside_loop
from ..context import local_proc
from ..host_mesh import HostMesh
from ..shapes.shape import Extent
from .errors import WorkspaceError
from .paths import Workspace, no_workspaces, workspace_of, workspaces_of
from .progress import Progress, show_progress
from .receiver import Receiver
from .scan import MAX_BYTES, MAX_FILES, Limits
from .sending import Sending, SyncReport
from .snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STOP_S: Final = 10.0
"""How long to wait for the processes of a sync to end."""


def sync(
    hosts: HostMesh,
    directory: str | os.PathLike[str] = ".",
    *,
    ignore: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
    timeout: float = 300.0,
    on_progress: Callable[[Progress], object] | None = None,
) -> SyncReport:
    """Make every host hold what ``directory`` holds; processes that are spawned there from now on run its code.

    Their search path and working directory lead to the host's copy where those of this process lead into ``directory``.
    Processes that run already go on with what they have imported; a rank that its policy starts again runs what was
    sent last. Blocks until all hosts are done.

    Args:
        hosts: Where to send it. The host of this process has it.
        directory: What to send. Rules in its ``.danausignore`` files, or else its ``.gitignore`` files, say what not,
            besides version control, caches and virtual environments.
        ignore: Further rules, as lines of those files.
        max_bytes: Refuse to send a directory that holds more.
        max_files: Refuse to send a directory with more files.
        timeout: Seconds for all of it.
        on_progress: Called after each step, in place of the bar that a terminal shows.

    Raises:
        WorkspaceTooLarge: The directory holds more than the limits; the message names what takes the most.
        WorkspaceError: It cannot be read here, or not be written there.
        TimeoutError: The time passed. What was sent is kept by no host that was not done.
        RuntimeError: Called on a thread that runs an event loop, which it would block.
    """
    refuse_inside_loop("sync_workspace()", "await asyncio.to_thread(hosts.sync_workspace)")
    if isinstance(ignore, str):
        raise TypeError(f"sync_workspace(ignore={ignore!r}): expected a list of rules, as in ignore=[{ignore!r}]")
    if not os.path.isdir(directory):
        raise WorkspaceError(f"sync_workspace({os.fspath(directory)!r}): there is no such directory here")
    local = local_proc()
    workspace = replace(
        workspace_of(os.fspath(directory), slot=local.slot), ignore=tuple(ignore), limits=Limits(max_bytes, max_files)
    )
    report = _send_to(hosts, workspace, timeout, on_progress, is_repeat=False)
    workspaces_of(local)[workspace.workspace_id] = workspace
    return report


def sync_again(hosts: HostMesh, *, timeout: float = 300.0) -> list[SyncReport]:
    """Send to ``hosts`` what this process has sent to others: hosts that take the place of lost ones need it."""
    known = [each for each in workspaces_of(local_proc()).values() if each.is_sent_from_here]
    return [_send_to(hosts, workspace, timeout, None, is_repeat=True) for workspace in known]


def _send_to(
    hosts: HostMesh,
    workspace: Workspace,
    timeout_s: float,
    on_progress: Callable[[Progress], object] | None,
    *,
    is_repeat: bool,
) -> SyncReport:
    started_s = time.monotonic()
    others = [host for host in hosts._here() if host.slot != workspace.home_slot]
    if not others:
        return SyncReport()
    mesh = HostMesh(others, Extent(("host",), (len(others),)).region)
    with no_workspaces():
        procs = mesh.spawn_procs(name="sync", preload=[], gpus="none")
    try:
        receivers = procs.spawn("sync", Receiver, workspace.workspace_id)
        with (
            contextlib.closing(Snapshot(workspace, local_proc().host)) as snapshot,
            show_progress(on_progress) as tell,
        ):
            if not (is_repeat and snapshot.reuse()):
                snapshot.take()
            report = Sending(receivers, snapshot.top, snapshot.manifest, started_s + timeout_s, tell).run()
    finally:
        # Of a host that is lost meanwhile the error says more than that nothing can be stopped there.
        with contextlib.suppress(TimeoutError):
            procs.stop(grace=1.0).exception(timeout=STOP_S)
    return replace(report, seconds=time.monotonic() - started_s, skipped=snapshot.skipped)
