"""`danaus job`: starts jobs from files, looks at them, runs things on their hosts, ends them.

A job is named by its file, or by its name once it has been started on this machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import DanausError
from ..runtime.jobs import JobError, JobState, load_job, saved_jobs
from ..runtime.jobs.job_file import is_job_file, read_job_file
from .job_view import Waiting, as_json, show_state, show_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.jobs import Job

SUMMARY = "start hosts from a file, look at them, run things on them, end them"

INTERRUPTED: Final = 130
DETACHED: Final = (
    "its hosts would end with this command: write `detached: true`, so that they stay until `danaus job kill`"
)


def main(arguments: Sequence[str]) -> int:
    """Run a subcommand; return its exit code: 0, what a command on a host returned, or 1 for an error."""
    parser = _parser()
    words, command = _split(arguments)
    options = parser.parse_args(words)
    options.command = command
    if (options.verb == "exec" and not command) or (command is not None and options.verb not in {"exec", "shell"}):
        parser.error("danaus job exec FILE|NAME -- COMMAND: the command comes after --, and no other has one but shell")
    try:
        return int(options.run(options))
    except (DanausError, OSError, ValueError) as error:
        print(f"danaus job {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return our own words, and the command after ``--`` if there is one."""
    words = list(arguments)
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def find_job(text: str) -> Job[Any]:
    """Return the job of a file, or the running job of that name.

    Raises:
        JobError: The file is wrong, or there is no such job.
    """
    if is_job_file(text):
        return read_job_file(text)
    if text not in saved_jobs() and os.path.exists(text):
        raise JobError(f"{text}: a job file ends in .yaml, .yml or .py; of that name no job was started")
    return load_job(text)


def _apply(options: argparse.Namespace) -> int:
    job = find_job(options.job)
    if getattr(job.spec, "detached", True) is False:
        raise JobError(f"{options.job}: {DETACHED}")
    job.apply()
    if options.wait:
        return _wait(job, options.timeout)
    show_state(job.state())
    return 0


def _wait(job: Job[Any], timeout_s: float | None) -> int:
    """Wait until all hosts listen; 1 if one has ended, or the limit has passed."""
    deadline_s = time.monotonic() + (job.default_timeout_s if timeout_s is None else timeout_s)
    waiting = Waiting(f"job {job.name}")
    try:
        while True:
            state = job.state()
            waiting.show(_progress(state))
            if state.status == "running" or time.monotonic() > deadline_s:
                break
            if any(host.status == "ended" for host in state.hosts):
                break
            time.sleep(job.poll_s)
    finally:
        waiting.end()
    show_state(state)
    is_up = all(host.status == "running" for host in state.hosts)
    if not is_up:
        print(
            f"danaus job apply: not all hosts of job {job.name!r} listen; it goes on until `danaus job kill`",
            file=sys.stderr,
        )
    return 0 if is_up else 1


def _progress(state: JobState) -> str:
    up = sum(host.status == "running" for host in state.hosts)
    pending = next((host for host in state.hosts if host.status == "pending" and host.detail), None)
    why = f"; host {pending.index}: {pending.detail}" if pending is not None else ""
    return f"{up} of {len(state.hosts)} hosts listen{why}"


def _state(options: argparse.Namespace) -> int:
    states = [find_job(name).state() for name in options.jobs] or [_saved_state(name) for name in saved_jobs()]
    if options.json:
        print(f"[{', '.join(map(as_json, states))}]")
    elif not states:
        print("no job was started from this machine by this user", file=sys.stderr)
    elif not options.jobs and len(states) > 1:
        rows = [[state.name, state.status, state.kind, _progress(state), state.detail] for state in states]
        show_table(("job", "status", "kind", "hosts", "detail"), rows)
    else:
        for state in states:
            show_state(state)
    return 0 if all(state.status != "ended" for state in states) or not options.jobs else 1


def _saved_state(name: str) -> JobState:
    """Return the state of one of all jobs; what is wrong with one must not hide the others."""
    try:
        return load_job(name).state()
    except DanausError as error:
        return JobState(name, "unknown", "pending", (), f"cannot be looked at: {error}")


def _hosts(options: argparse.Namespace) -> int:
    state = find_job(options.job).state()
    for host in state.hosts:
        if host.address:
            print(host.address)
    silent = [str(host.index) for host in state.hosts if host.status != "running"]
    if silent or not state.hosts:
        which = f"hosts {', '.join(silent)} do not listen" if silent else "it does not run"
        print(f"danaus job hosts: job {state.name!r}: {which}", file=sys.stderr)
        return 1
    return 0


def _kill(options: argparse.Namespace) -> int:
    for name in options.jobs:
        job = find_job(name)
        was = job.state().status
        job.kill()
        print(f"job {job.name}: {'has ended' if was != 'ended' else 'did not run'}")
    return 0


def _render(options: argparse.Namespace) -> int:
    job = find_job(options.job)
    if options.key is None:
        text = job.render()
    else:
        from ..runtime.jobs.kubernetes_job import KubernetesJob

        if not isinstance(job, KubernetesJob):
            raise JobError(f"--key fills in the Secret of a kubernetes job; this one is of kind {job.kind!r}")
        text = job.render(key_file=options.key)
    print(text, end="" if text.endswith("\n") else "\n")
    return 0


def _exec(options: argparse.Namespace) -> int:
    from .job_remote import exec_on_hosts

    # One word may be a whole line of shell.
    command = ["sh", "-c", *options.command] if len(options.command) == 1 else options.command
    return exec_on_hosts(find_job(options.job), options.host or [], command, timeout_s=options.timeout)


def _shell(options: argparse.Namespace) -> int:
    from .job_shell import open_shell

    return open_shell(find_job(options.job), options.host, options.command or [], timeout_s=options.timeout)


def _logs(options: argparse.Namespace) -> int:
    from .job_remote import show_daemon_logs, show_logs

    job, chosen = find_job(options.job), options.host or []
    if options.daemon:
        return show_daemon_logs(job, chosen, lines=options.lines)
    return show_logs(job, chosen, lines=options.lines, follow=options.follow, timeout_s=options.timeout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danaus job",
        description="Start hosts from a file, look at them, run things on them, end them.",
        epilog="A job is given by its FILE (.yaml, .yml, or .py with a variable `job`), or by its NAME once it was "
        "started from this machine by this user.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    apply = _verb(verbs, "apply", _apply, "start a job, unless it runs")
    apply.add_argument("--wait", action="store_true", help="until all its hosts listen")
    apply.add_argument("--timeout", type=_seconds, metavar="S", help="limit for --wait; by default the kind's own")

    state = verbs.add_parser("state", help="show a job and its hosts, or all jobs; 1 if it does not run")
    state.add_argument("jobs", nargs="*", metavar="FILE|NAME")
    state.add_argument("--json", action="store_true", help="for other programs")
    state.set_defaults(run=_state)

    _verb(verbs, "hosts", _hosts, "print the addresses of its hosts; 1 if not all listen")

    kill = verbs.add_parser("kill", help="end all hosts of a job, whichever script started it")
    kill.add_argument("jobs", nargs="+", metavar="FILE|NAME")
    kill.set_defaults(run=_kill)

    execute = _verb(verbs, "exec", _exec, "run a command on every host; the highest of their exit codes")
    _host_options(execute, "once for each host; by default all that listen")
    execute.usage = "danaus job exec [-h] [--host N] [--timeout S] FILE|NAME -- COMMAND"
    execute.epilog = "A COMMAND of one word is a line for sh, one of several is run as it is."

    shell = _verb(verbs, "shell", _shell, "open a terminal on one host")
    shell.add_argument("--host", type=int, default=0, metavar="N", help="which (default %(default)s)")
    shell.usage = "danaus job shell [-h] [--host N] [--timeout S] FILE|NAME [-- COMMAND]"
    shell.epilog = "COMMAND is the user's shell there by default; it has a terminal of the size of this one."
    _timeout_option(shell)

    logs = _verb(verbs, "logs", _logs, "show what the ranks of its newest run wrote")
    _host_options(logs, "once for each host; by default all that listen")
    logs.add_argument("--lines", type=int, default=20, metavar="N", help="last ones of each rank (default %(default)s)")
    logs.add_argument("--follow", "-f", action="store_true", help="go on with what they write, until Ctrl-C")
    logs.add_argument(
        "--daemon", action="store_true", help="what the hosts' daemons wrote instead; needs no connection"
    )

    render = _verb(verbs, "render", _render, "print what would be run or submitted; starts nothing")
    render.add_argument("--key", metavar="KEYFILE", help="kubernetes: fill in the Secret, to apply it elsewhere")
    return parser


def _verb(verbs: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.add_argument("job", metavar="FILE|NAME")
    parser.set_defaults(run=run)
    return parser


def _host_options(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("--host", type=int, action="append", metavar="N", help=summary)
    _timeout_option(parser)


def _timeout_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="for hosts to answer (%(default)g)")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected seconds, more than 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
