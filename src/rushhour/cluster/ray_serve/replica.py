"""`Replica`: what Ray Serve runs. It owns a whole `rushhour serve` process; clients reach that process directly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from rushhour.cluster.node_folder import own_folder
from rushhour.cluster.ray_serve.claims import Claims
from rushhour.cluster.ray_serve.forwarding import METHODS, Forwarder, Message
from rushhour.cluster.ray_serve.order import Order
from rushhour.cluster.ray_serve.packing import unpack
from rushhour.cluster.ray_serve.registry import Registry, Replicated
from rushhour.cluster.ray_serve.scaling import ANSWERED, OFFERED, SHED, WAIT
from rushhour.errors import RushhourError, ServeError
from rushhour.serve import ServeSettings
from rushhour.serve.access.exposure import is_loopback
from rushhour.serve.child import ChildServer

DRAIN_S: Final = 30.0
"""For what is in flight, after the delay."""
CLOSING_S: Final = 10.0
"""From the end of that to the end of the process, at most."""
FAILED: Final = "rushhour: "
"""What the error of a replica begins with that cannot start."""

ADDRESSES: Final = "/replicas"
"""The path behind Ray's proxy at which clients find the addresses of all replicas."""

_LOOK_S: Final = 0.05
_HEALTH_S: Final = 3.0
_ACCEPT_S: Final = 0.5
_STARTS: Final = 3


class Replica:
    """A replica.

    Args:
        text: an `Order` as JSON.

    Raises:
        RuntimeError: if its server does not start: `FAILED` and the reason, in one line.
    """

    def __init__(self, text: str) -> None:
        self._closed = threading.Event()
        self._order = msgspec.json.decode(text, type=Order)
        self._registry = Registry()
        self._rates = Rates(self._order.limit_s)
        self._claims: Claims | None = None
        self._child: ChildServer | None = None
        try:
            self._child = self._start()
        except RushhourError as error:
            self._free()
            raise RuntimeError(f"{FAILED}{error}") from None
        self._forwarder = Forwarder(_reachable(self._child.url), _reachable(self._child.grpc))
        self._registry.join(self._order.name, self._entry)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _start(self) -> ChildServer:
        """The server, on cores of its own where there are enough.

        Raises:
            RushhourError: if it does not start.
        """
        import ray
        from ray import serve

        order = self._order
        if order.version != version("rushhour"):
            raise ServeError(
                f"a node has Rushhour {version('rushhour')}",
                f"the deployment was made with {order.version}",
                "install the same version on all nodes",
            )
        self._claims = Claims(own_folder("replicas"))
        runs = self._claims.runs(order.run)
        there = (runs / order.run / ".complete").is_file()
        folder = unpack(b"" if there else self._registry.package(order.run), order.run, runs)
        self._cores = self._claims.cores(order.cpus, os.sched_getaffinity(0))
        context = serve.get_replica_context()
        self._entry = Replicated(
            id=context.replica_id.unique_id,
            actor=context.replica_id.to_full_id_str(),
            state="ready",
            plan=order.plan,
            http="",
            grpc="",
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            server_pid=0,
            cores=tuple(self._cores),
        )
        child = self._serve(folder)
        host = ray.util.get_node_ip_address()
        if is_loopback(host):
            _keep_to_loopback()
        self._entry = msgspec.structs.replace(
            self._entry, http=_public(child.url, host), grpc=_public(child.grpc, host), server_pid=child.pid
        )
        return child

    def _serve(self, folder: Path) -> ChildServer:
        """Start the server; on another port where another program was faster.

        Raises:
            ServeError: if it does not start.
        """
        order, kinds = self._order, 2 if self._order.grpc else 1
        assert self._claims is not None
        for attempt in range(1, _STARTS + 1):
            ports = [0] * kinds
            if order.ports is not None:
                ports = self._claims.ports(kinds, order.ports, order.host)
            settings = ServeSettings(
                host=order.host,
                http_port=ports[0],
                grpc_port=ports[1] if order.grpc else None,
                model=order.model,
                exposed=order.exposed,
                admin=False,  # of one replica alone
                cells=order.cells,
                streams=order.streams,
                threads=order.threads,
                exact=False,
                drain_delay_s=order.drain_delay_s,
                drain_timeout_s=DRAIN_S,
                log_format="json",
            )
            try:
                with _pinned(self._cores):
                    return ChildServer(folder, settings, _own_log())
            except ServeError as error:
                if attempt == _STARTS or order.ports is None or "port" not in error.why:
                    raise
        raise AssertionError

    def _watch(self) -> None:
        """End this process with its server: Ray starts another replica at once, without waiting for health checks."""
        assert self._child is not None
        while not self._closed.wait(_LOOK_S):
            if not self._child.is_running:
                with contextlib.suppress(Exception):
                    self._registry.leave(self._order.name, self._entry.id)
                os._exit(1)

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica after three errors.

        Raises:
            OSError: if the server is not ready.
        """
        if not self._closed.is_set():
            await self._forwarder.text("/v2/health/ready", _HEALTH_S)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve: what its policy decides on (`scaling`), since the last call."""
        if self._closed.is_set():
            return {}
        return self._rates.since_last(await self._forwarder.text("/metrics", _HEALTH_S), time.monotonic())

    async def __call__(self, request: Any) -> Any:
        """A request that came through Ray's proxy: to the server, but for the list of addresses."""
        if request.scope["path"].endswith(ADDRESSES) and request.scope["method"] == "GET":
            return await self._addresses()
        return await self._forwarder.request(request)

    async def _addresses(self) -> Any:
        """Where the replicas answer, for clients that reach them directly."""
        from starlette.responses import Response

        found = await asyncio.to_thread(self._registry.replicas, self._order.name)
        accept = await asyncio.gather(*(accepts(each.http) for each in found))
        shown = [
            {"http": each.http, "grpc": each.grpc, "state": each.state if there else "unreachable", "plan": each.plan}
            for each, there in zip(found, accept, strict=True)
        ]
        return Response(msgspec.json.encode({"replicas": shown}), media_type="application/json")

    def __del__(self) -> None:
        """Called by Ray Serve when the replica is to end: its server drains, and ends."""
        child = getattr(self, "_child", None)
        if child is None or self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._registry.join(self._order.name, msgspec.structs.replace(self._entry, state="draining"))
        child.close(self._order.drain_delay_s + DRAIN_S + CLOSING_S)
        with contextlib.suppress(Exception):
            self._registry.leave(self._order.name, self._entry.id)
        self._free()

    def _free(self) -> None:
        if self._claims is not None:
            self._claims.close()


def _call(method: str) -> Callable[..., Any]:
    async def forward(self: Any, message: bytes, grpc_context: Any) -> Message:
        answer: Message = await self._forwarder.call(method, message, grpc_context)
        return answer

    forward.__name__ = method
    return forward


for _method in METHODS:  # Ray's gRPC proxy calls the method of the same name
    setattr(Replica, _method, _call(_method))


class Rates:
    """Rates from a server's metrics.

    Args:
        limit_s: of the SLO.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._before: tuple[float, dict[str, float]] | None = None

    def since_last(self, text: str, now_s: float) -> dict[str, float]:
        """What each second had since the last call; the first time there is nothing to compare with.

        Args:
            text: of the metrics, in Prometheus' format.
            now_s: on any clock.
        """
        totals = _totals(text, self._limit_s)
        before, self._before = self._before, (now_s, totals)
        if before is None:
            return dict.fromkeys((ANSWERED, OFFERED, SHED, WAIT), 0.0)
        elapsed = max(1e-6, now_s - before[0])
        grown = {name: max(0.0, value - before[1].get(name, 0.0)) for name, value in totals.items()}
        answered = grown["answered"] / elapsed
        waited = grown["waited_s"] / grown["batched"] if grown["batched"] else 0.0
        predicted = totals["queue"] / answered if answered else 0.0
        return {
            ANSWERED: grown["in_time"] / elapsed,
            OFFERED: (grown["answered"] + grown["shed"]) / elapsed,
            SHED: grown["shed"] / elapsed,
            WAIT: max(waited, predicted),
        }


def _totals(text: str, limit_s: float) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    found = dict.fromkeys(("answered", "shed", "in_time", "waited_s", "batched", "queue"), 0.0)
    names = {
        "rushhour_shed_total": "shed",
        "rushhour_queue_seconds_sum": "waited_s",
        "rushhour_queue_seconds_count": "batched",
        "rushhour_queue_samples": "queue",
    }
    within: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in names:
                found[names[sample.name]] += sample.value
            elif sample.name == "rushhour_requests_total" and sample.labels.get("outcome") == "success":
                found["answered"] += sample.value
            elif sample.name == "rushhour_request_seconds_bucket":
                bound = float(sample.labels["le"])
                within[bound] = within.get(bound, 0.0) + sample.value
    in_time = [bound for bound in within if bound <= limit_s * (1 + 1e-9)]
    found["in_time"] = within[max(in_time)] if in_time else 0.0
    return found


def _keep_to_loopback() -> None:
    """Have this replica's port for Ray's own calls listen on loopback: Ray opens it on all addresses, and unpickles
    what it receives there."""
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, at: listen(server, at.replace("[::]", "127.0.0.1"))


@contextlib.contextmanager
def _pinned(cores: list[int]) -> Iterator[None]:
    """This thread on these cores, which a process that it starts inherits; on all where there are none."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _own_log() -> Path | None:
    """The file of this process's errors, which Ray keeps with the logs of the session."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(2).st_mode):
            return Path("/proc/self/fd/2")
    return None


def _reachable(address: str) -> str:
    """The address of a server on this machine, from this machine."""
    return address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "127.0.0.1")


def _public(address: str, host: str) -> str:
    """The address of a server, from other machines, where it listens on all of this one's."""
    return address.replace("0.0.0.0", host).replace("[::]", host)


async def accepts(url: str) -> bool:
    """Whether a server accepts connections within half a second.

    A node is taken for dead by Ray only after some seconds; nobody shall be sent there until then.

    Args:
        url: `http://HOST:PORT`.
    """
    parts = urlsplit(url)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, parts.port), _ACCEPT_S)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
