"""`python keeper.py COMMAND...`: runs a server and ends it, with every process it ever started.

Whatever a server does (forks, daemons, sessions of its own), its processes stay below this one: the kernel hands
orphans to the nearest subreaper. It ends when its standard input does, so not even a killed benchmark leaves a server
behind. It closes its standard output when the server has been started; what the server says goes to standard error.
Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 5.0


def descendants(root: int) -> list[int]:
    """All processes below `root` that live. One whose main thread has ended lives on in its other threads."""
    children: dict[int, list[int]] = {}
    ended = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(folder.name))
                if state == "Z" and len(os.listdir(folder / "task")) < 2:
                    ended.add(int(folder.name))
    found, new = [], children.get(root, [])
    while new:
        found += new
        new = [child for pid in new for child in children.get(pid, [])]
    return [pid for pid in found if pid not in ended]


def main(command: list[str]) -> None:
    """Start, wait for the end of input, clean up."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.close(0))
    signal.signal(signal.SIGCHLD, _reap)
    # Its input stays open as long as this process lives: some servers stop when it ends.
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, start_new_session=True)
    os.close(1)
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(OSError):
        os.kill(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE_S
    while _has_children():
        if time.monotonic() > deadline:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _has_children() -> bool:
    """Whether any process is left: orphans become children of this one. Reaps those that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _reap(number: int, frame: object) -> None:
    _has_children()


if __name__ == "__main__":
    main(sys.argv[1:])
