"""Two machines on one: processes that have neither a network nor process ids in common, only a cable and the disk."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final

ADDRESSES: Final = ("10.213.77.1", "10.213.77.2")
"""Of the two machines, on the cable between them."""
_NEEDED: Final = ("ip", "unshare", "hostname", "taskset")


class Machines:
    """Two machines that `two_machines` made.

    Args:
        names: of their network namespaces.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def command(self, machine: int, *words: str) -> list[str]:
        """A command as one of the machines, 0 or 1, runs it: on half of the cores. Host names resolve to nothing."""
        allowed = sorted(os.sched_getaffinity(0))
        half = max(1, len(allowed) // 2)
        own = allowed[half * machine :][:half] or allowed[:half]
        pinned = ["taskset", "-c", ",".join(map(str, own))]
        # its own process ids too: workers that see each other's processes would share memory
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        named = ["sh", "-c", f'hostname {self._names[machine]} && exec "$@"', "sh"]
        return [*pinned, "ip", "netns", "exec", self._names[machine], *apart, *named, *words]


@contextlib.contextmanager
def two_machines() -> Iterator[Machines]:
    """Two machines while the block runs, on a veth pair.

    Raises:
        CannotSeparate: where this process may not make them.
    """
    if missing := [name for name in _NEEDED if shutil.which(name) is None]:
        raise CannotSeparate(f"there is no command {missing[0]}")
    mark = secrets.token_hex(3)  # an interface's name has 15 characters at most
    names = [f"rh{mark}{side}" for side in "ab"]
    made: list[str] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        first, second = names
        ends = ["type", "veth", "peer", "name", f"{second}-0", "netns", second]
        _run("ip", "link", "add", f"{first}-0", "netns", first, *ends)
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", f"{name}-0")
            for interface in ("lo", f"{name}-0"):
                _run("ip", "-n", name, "link", "set", interface, "up")
        machines = Machines(names)
        for side in range(2):
            _run(*machines.command(side, "true"))
        yield machines
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class CannotSeparate(Exception):
    """This process may not make network namespaces; the message says why."""


def torchrun(machine: int, *words: str) -> list[str]:
    """The start of a command that runs one worker on this one of two machines; the first has the rendezvous.

    Torchrun would compare the endpoint with the addresses of its own host name, which resolves to nothing here, and
    tell others that name: so both are said.

    Args:
        machine: 0 or 1.
        words: of Python's command line: a script, or `-m` and a module.
    """
    return [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "rushhour"),
        *("--rdzv-conf", f"is_host={'false' if machine else 'true'}", "--local-addr", ADDRESSES[machine]),
        *words,
    ]


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CannotSeparate(f"{' '.join(words)}: {lines[-1]}")
