"""--enforce: lets the kernel enforce the memory budget, in a control group (memory/os/cgroup.py).

The command runs itself again as a child, which is in the group before it starts: memory is charged to the
group in which a process allocates it, and moving a running process would leave its earlier memory outside.
The parent stays outside of the group. It is small, because it imports nothing of lowtide's runtime; it
forwards signals to the child and the exit code to the shell, and removes the group whatever happens.

The limit is set only after the child has planned (`set_limit`), because the budget may be a share of the
machine's memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lowtide.memory.budget import Budget
    from lowtide.memory.os.cgroup import ControlGroup

Command = TypeVar("Command", bound=Callable[..., Any])

FORWARDED = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)
PR_SET_PDEATHSIG = 1


def enforce_option(command: Command) -> Command:
    """Add --enforce; its value is the control group of this process, None without the option.

    With the option, the command runs again inside a new group, and this process ends with its exit code.
    Raises `NotEnforceable` if no group can be created, `KilledByLimit` if the kernel killed the child.
    """
    return click.option(
        "--enforce",
        is_flag=True,
        callback=_enter_group,
        help="Let the kernel enforce the budget, and kill the process if it exceeds it (Linux with control "
        "groups).",
    )(command)


def _enter_group(
    ctx: click.Context, _parameter: click.Parameter, enabled: bool
) -> ControlGroup | None:
    if not enabled or ctx.resilient_parsing:
        return None
    from lowtide.memory.os.cgroup import ControlGroup

    group = ControlGroup.joined(os.getppid())
    if group is None:
        # Before the command imports anything: this process only waits, and should stay small.
        raise SystemExit(_run_again())
    return group


@contextlib.contextmanager
def clean_termination() -> Iterator[None]:
    """Let SIGTERM end the block like an exception, so that it removes the groups it has created."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def set_limit(group: ControlGroup | None, budget: Budget) -> None:
    """Set the group's limit for a process with this budget, and print it."""
    if group is None:
        return
    from lowtide.cli.common.output import note
    from lowtide.memory.os.cgroup import limit_for
    from lowtide.memory.units import format_bytes

    limit_bytes = limit_for(budget.num_bytes)
    group.set_limit(limit_bytes)
    note(f"Enforced: the kernel kills this process above {format_bytes(limit_bytes)}.")


def _run_again() -> int:
    from lowtide.memory.os.cgroup import ControlGroup

    # Signals wait until they can be forwarded: none may end this process while the group exists.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    try:
        return _run_in(ControlGroup.make(), mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_in(group: ControlGroup, mask: set[int]) -> int:
    """Run the child in `group` with the original signal `mask`; return its exit code as shells do."""
    try:
        pid = _start_in(group, mask)
        code = os.waitstatus_to_exitcode(_wait_for(pid))
        if code == -signal.SIGKILL and group.num_kills:
            raise _killed(group)
    finally:
        group.remove()
    return code if code >= 0 else 128 - code


def _killed(group: ControlGroup) -> Exception:
    from lowtide.memory.units import KilledByLimit, format_bytes

    limit = f" of {format_bytes(group.limit_bytes)}" if group.limit_bytes else ""
    return KilledByLimit(
        f"the kernel killed lowtide at the enforced limit{limit}, and unsaved data is lost: raise --memory"
    )


def _start_in(group: ControlGroup, mask: set[int]) -> int:
    """Start this command line as a child that enters `group` before it runs; return its process id."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(write_end)
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if os.read(read_end, 1):
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        finally:
            os._exit(1)
    os.close(read_end)
    try:
        group.admit(pid)
        os.write(write_end, b"!")
    finally:
        os.close(write_end)
    return pid


def _wait_for(pid: int) -> int:
    """Forward signals that were sent to this process alone until the child ends; return its status."""
    while True:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        if ended_pid:
            return status
        received = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
        # The kernel sends a terminal's Ctrl-C to the child as well; that is not forwarded.
        if received.si_signo != signal.SIGCHLD and received.si_code <= 0:
            os.kill(pid, received.si_signo)
