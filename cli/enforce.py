"""--enforce: the command runs itself again, as a child in a control group that the kernel limits.

What waits outside is this small process: it passes signals on and the exit code back, and removes the group
whatever happens. Knows no plan but its budget.
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

PASSED_ON = frozenset(
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
    """Add --enforce, whose value is the control group that the command runs in; None without it.

    Where it is given the command is run again, inside a new group, and this process ends with its exit
    code. Raises `NotEnforceable` where no group can be made, `KilledByLimit` where the kernel ended the
    child.
    """
    return click.option(
        "--enforce",
        is_flag=True,
        callback=_entered_group,
        help="Have the kernel hold the budget too (Linux, where control groups can be made): a process "
        "that passes it is killed.",
    )(command)


def _entered_group(
    ctx: click.Context, _parameter: click.Parameter, wanted: bool
) -> ControlGroup | None:
    if not wanted or ctx.resilient_parsing:
        return None
    from lowtide.memory.os.cgroup import ControlGroup

    group = ControlGroup.joined(os.getppid())
    if group is None:
        # Here, before the command imports anything: this process waits, and should be small.
        raise SystemExit(_run_again())
    return group


@contextlib.contextmanager
def tidy_termination() -> Iterator[None]:
    """Let SIGTERM end the block as an error would, so that no group that it has made is left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def hold(group: ControlGroup | None, budget: Budget) -> None:
    """Set the group's limit to what a process inside `budget` may be charged, and say so."""
    if group is None:
        return
    from lowtide.cli.output import note
    from lowtide.memory.os.cgroup import limit_for
    from lowtide.memory.units import format_bytes

    limit_bytes = limit_for(budget.num_bytes)
    group.hold(limit_bytes)
    note(f"enforced: above {format_bytes(limit_bytes)} the kernel ends this process")


def _run_again() -> int:
    from lowtide.memory.os.cgroup import ControlGroup

    # From here on signals wait until they can be passed on: none may end us while there is a group.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON | {signal.SIGCHLD})
    try:
        return _ended_in(ControlGroup.make(), mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _ended_in(group: ControlGroup, mask: set[int]) -> int:
    """Run the child in `group` with the signal `mask` that we had; return its exit code as shells do."""
    try:
        pid = _started_in(group, mask)
        code = os.waitstatus_to_exitcode(_waited_for(pid))
        if code == -signal.SIGKILL and group.num_kills:
            raise _killed(group)
    finally:
        group.remove()
    return code if code >= 0 else 128 - code


def _killed(group: ControlGroup) -> Exception:
    from lowtide.memory.units import KilledByLimit, format_bytes

    limit = f" of {format_bytes(group.limit_bytes)}" if group.limit_bytes else ""
    return KilledByLimit(
        f"the kernel ended lowtide at the enforced limit{limit}, and what was not saved is lost: raise "
        "--memory"
    )


def _started_in(group: ControlGroup, mask: set[int]) -> int:
    """Start this command line as a child that is in `group` before it begins; return its process id."""
    import ctypes

    die_with = ctypes.CDLL(None).prctl
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    wait_end, go_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go_end)
            die_with(PR_SET_PDEATHSIG, signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if os.read(wait_end, 1):
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        finally:
            os._exit(1)
    os.close(wait_end)
    try:
        group.admit(pid)
        os.write(go_end, b"!")
    finally:
        os.close(go_end)
    return pid


def _waited_for(pid: int) -> int:
    """Return the status that the child ended with; until then pass on what signals are sent to us alone."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        received = signal.sigwaitinfo(PASSED_ON | {signal.SIGCHLD})
        # What the kernel sends, such as a terminal's Ctrl-C, the child has got as well.
        if received.si_signo != signal.SIGCHLD and received.si_code <= 0:
            os.kill(pid, received.si_signo)
