"""What runs on a node: it starts the command of a job, and may keep it.

    batch job:  keeper.py run FILE  ─► reads its description ─► starts the command, ends as it does
    step:       keeper.py keep FILE ─► starts it ◄── lines of srun's standard input, for all tasks
                                        └────────► lines of its standard output: what became of it

The number of the task says which description in the file is its own. A keeper stays when its
command has ended, for the next one costs no wait in a queue; when its input ends, its master is
gone, and so is all that it has started.

It is run by its path and is alone: it imports nothing of Fiber. What it says and is told are words
between tabs, a line each, short enough for Slurm to pass them on whole.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

WARNING = 23  # SIGURG: the time of the allocation is nearly up
KILL = signal.SIGUSR2  # to the keeper of a batch job: its command shall be gone soon
LOOK = 0.5  # seconds between two looks at the memory of what runs
PATIENCE = (
    1.5  # seconds that a command has to clear up when the master needs it no more, or is gone
)
RECORD = "FIBER_INTERNAL_MEMORY_RECORD"
"""The variable by which an agent is told where it is written how often a process was killed."""
PAGE = os.sysconf("SC_PAGE_SIZE")
LISTED = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
"""Whether the kernel lists the children of a process: all processes of a large node are many."""


def describe(path: str, number: int) -> tuple[list[str], dict[str, str], dict[str, Any]]:
    """Return command and environment of a job, and what else there is to know.

    That is `log`, the path of its log, `memory`, the MB that it may use, and `processes`, how many
    will share it.
    """
    found: Any = None
    for _ in range(50):
        try:
            with open(path) as file:
                found = json.load(file)
            break
        except FileNotFoundError:
            time.sleep(0.1)  # a network's file system may be late
    if found is None:
        sys.exit("fiber: the description of this job is gone, and so is its master")
    texts = found["texts"]
    job = found["jobs"][number]
    environment = {texts[name]: texts[value] for name, value in job["environment"]}
    return [texts[part] for part in job["command"]], environment, job


def execute(command: list[str], environment: dict[str, str]) -> str:
    """Become `command`; return only to say why not."""
    os.environ.update(environment)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        return f"cannot run {command[0]}: {error.strerror}"


def run(path: str) -> NoReturn:
    """Run the command of a batch job, and end as it does.

    Slurm's warning reaches all processes of the job, and only this one knows what it means: it has
    the command end, and an agent's processes finish what they are at. The command has a group of
    its own, so that what is for the group of this one does not reach those either.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        sys.exit("fiber: this job was requeued, and another has taken its place")
    command, environment, _ = describe(path, int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0))
    libc = library()
    signals = {signal.SIGTERM, signal.SIGINT, WARNING, KILL, signal.SIGALRM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            if libc is not None:
                libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            print("fiber: " + execute(command, environment), file=sys.stderr, flush=True)
        finally:
            os._exit(127)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, WARNING):
        signal.signal(number, lambda *_: os.kill(pid, signal.SIGTERM))
    # An agent was told before, and is removing what it has on this node.
    signal.signal(KILL, lambda *_: signal.setitimer(signal.ITIMER_REAL, PATIENCE))
    signal.signal(signal.SIGALRM, lambda *_: kill(pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def library() -> Any:
    """Return the C library, None if there is no way to call it."""
    try:
        import ctypes

        return ctypes.CDLL(None)
    except Exception:
        return None


class Keeper:
    """Keeps the command of one job at a time."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.me = os.environ["SLURM_PROCID"]
        self.job = os.environ.get("SLURM_JOB_ID", "job")
        self.pid = 0
        self.key = ""
        self.limit: int | None = None
        self.shared = False  # whether several processes share what runs
        self.kills = 0
        self.record = -1
        self.leaving = False
        self.ended_by_slurm = False
        self.exceeded = False
        self.doom = 0.0  # of `monotonic`, when what runs is killed; 0 if it may live
        self.input = b""
        self.wake, self.ring = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self.ring, False)
        signal.set_wakeup_fd(self.ring, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, WARNING):
            signal.signal(number, self.on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.libc = library()
        if self.libc is not None:
            self.libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what is orphaned is ours

    def say(self, *words: object) -> None:
        data = "\t".join([self.me, *map(str, words)]) + "\n"
        try:
            os.write(1, data.encode())
        except OSError:
            pass  # the end of our input will tell

    def on_signal(self, number: int, frame: object) -> None:
        """Handle a signal, at the next step of the interpreter."""
        if number == signal.SIGTERM:
            self.leaving = self.ended_by_slurm = True
        elif number == WARNING and self.pid:
            self.leaving = True
            os.kill(self.pid, signal.SIGTERM)

    def start(self, key: str, path: str, number: int) -> None:
        """Start a command."""
        self.key = key
        command, environment, more = describe(path, number)
        self.limit, self.shared = more["memory"], more["processes"] > 1
        self.exceeded, self.doom = False, 0.0
        if self.limit and self.shared:
            self.note(self.limit)
            if self.record >= 0:
                environment[RECORD] = f"/proc/{os.getpid()}/fd/{self.record}"
        failed, fail = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self.prepare(more["log"])
                os.write(fail, execute(command, environment).encode())
            finally:
                os._exit(127)
        os.close(fail)
        self.pid = pid
        error = os.read(failed, 1000).decode()  # it ends when the command has taken over
        os.close(failed)
        self.say("started", key, os.environ.get("SLURMD_NODENAME", ""), error.replace("\n", " "))

    def prepare(self, log: str) -> None:
        """In the child: streams and signals as a command expects them."""
        if self.libc is not None:
            self.libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, WARNING, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        try:
            path = log.replace("%j", self.job)
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError:
            out = null
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)

    def reap(self) -> None:
        """Take note of what has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.pid = 0
                self.clear()
                reason = "OOMKilled" if self.exceeded else "Leaving" if self.ended_by_slurm else ""
                self.say("ended", self.key, status, reason)

    def clear(self) -> None:
        """Kill what a command left behind."""
        for _ in range(50):
            found = [pid for pid, parent in parents().items() if parent == os.getpid()]
            if not found:
                return
            for pid in found:
                kill(pid)
                try:
                    os.waitpid(pid, 0)
                except ChildProcessError:
                    pass

    def note(self, limit: int) -> None:
        """Write down, in a file in memory, how often a process was killed, as the kernel does.

        An agent reads it to know why one of its processes was.
        """
        try:
            if self.record < 0:
                self.record = os.memfd_create("fiber-memory")
            os.pwrite(self.record, b"limit %d\noom_kill %08d\n" % (limit, self.kills), 0)
        except (AttributeError, OSError):
            pass  # then it was killed, and nobody knows why

    def look(self, limit: int) -> None:
        """End what has used more bytes than it asked for, before Slurm ends all.

        Of several processes that share a job, it is the one that has used the most.
        """
        tree = family(self.pid)
        if sum(map(resident, tree)) <= limit:
            return
        used = {pid: proportional(pid) for pid in tree}  # pages that they share count once
        if sum(used.values()) <= limit:
            return
        parts = [family(pid) for pid, parent in parents().items() if parent == self.pid]
        if self.shared and len(parts) > 1:
            tree = max(parts, key=lambda part: sum(used.get(pid, 0) for pid in part))
            self.kills += 1
            self.note(limit >> 20)
        else:
            self.exceeded = True
        for pid in tree:
            kill(pid)

    def obey(self, line: str) -> None:
        """Do what the master says, if it is said to this task."""
        task, what, *words = line.split("\t")
        if task != self.me:
            return
        if what == "start" and not self.pid:
            key, name, number = words
            self.start(key, os.path.join(self.folder, name), int(number))
        elif what == "signal" and self.pid and words[0] == self.key:
            if int(words[1]) == signal.SIGKILL:
                # An agent was told before, and is removing what it has on this node.
                self.doom = time.monotonic() + PATIENCE
            else:
                os.kill(self.pid, int(words[1]))

    def serve(self) -> None:
        """Until the input ends, or Slurm ends the step and the command has ended."""
        while not (self.leaving and not self.pid):
            timeout = LOOK if self.pid and (self.limit or self.doom) else None
            ready = select.select([0, self.wake], [], [], timeout)[0]
            if self.wake in ready:
                os.read(self.wake, 4096)
            self.reap()
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    break
                *lines, self.input = (self.input + data).split(b"\n")
                for line in lines:
                    self.obey(line.decode())
            if self.pid and self.doom and time.monotonic() > self.doom:
                kill(self.pid)
            elif self.pid and self.limit and not self.exceeded:
                self.look(self.limit << 20)
        # An agent finds out by itself that its master is gone, and clears up.
        end = time.monotonic() + PATIENCE
        while self.pid and time.monotonic() < end:
            if select.select([self.wake], [], [], 0.1)[0]:
                os.read(self.wake, 4096)
            self.reap()
        if self.pid:
            kill(self.pid)
            os.waitpid(self.pid, 0)
        self.clear()


def kill(pid: int) -> None:
    """Kill a process that may be gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def parents() -> dict[int, int]:
    """Return the parents of all processes."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                pass  # it has ended
    return found


def children(pid: int) -> list[int]:
    """Return the children of a process, as far as the kernel tells."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it has ended
    return found


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    of: Callable[[int], list[int]] = children
    if not LISTED:
        table = parents()
        of = lambda parent: [child for child, its in table.items() if its == parent]  # noqa: E731
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += of(pid)
    return found


def resident(pid: int) -> int:
    """Return the bytes in memory of a process."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return 0


def proportional(pid: int) -> int:
    """Return the bytes in memory of a process, with its part of what it shares."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def keep(path: str, place: str, first: str) -> None:
    """Be a keeper."""
    keeper = Keeper(os.path.dirname(path))
    number = int(keeper.me)
    step = os.environ.get("SLURM_STEP_ID", "0")
    keeper.say("here", keeper.job, step, os.environ.get("SLURMD_NODENAME", ""))
    keeper.start(str(int(first) + number), path, int(place) + number)
    keeper.serve()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2])
    keep(*sys.argv[2:])
