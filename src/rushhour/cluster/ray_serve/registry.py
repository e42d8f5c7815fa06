"""What a Ray cluster knows of our deployments, in its own key-value store: packages of runs, orders, replicas.

It outlives the command that wrote it, as the objects of Ray's object store do not, and is there as long as the cluster.
Values are JSON and packages' bytes; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal, TypeVar

import msgspec

from rushhour.cluster.ray_serve.order import Order
from rushhour.errors import ServeError

_NAMESPACE: Final = b"rushhour"
_CHUNK: Final = 8 * 2**20
_LOCAL: Final = "local"

S = TypeVar("S", bound=msgspec.Struct)


class Replicated(msgspec.Struct, frozen=True):
    """A replica.

    Attributes:
        id: of the replica, within its deployment.
        actor: its name as an actor of Ray.
        state: whether it takes requests, or finishes those that it has.
        plan: the SHA-256 of the plan that it serves.
        http: where its server answers: `http://127.0.0.1:34567`.
        grpc: host and port; empty without.
        node: Ray's identifier of its node.
        pid: of the actor.
        server_pid: of its server.
        cores: that its server is pinned to; empty where it shares the node's cores.
    """

    id: str
    actor: str
    state: Literal["ready", "draining"]
    plan: str
    http: str
    grpc: str
    node: str
    pid: int
    server_pid: int
    cores: tuple[int, ...] = ()


class Record(msgspec.Struct, frozen=True):
    """A deployment.

    Attributes:
        current: what is deployed.
        previous: what was deployed before; None where this is the first.
        coming: what it is being updated to; also after a command that was killed meanwhile.
    """

    current: Order
    previous: Order | None = None
    coming: Order | None = None


class Local(msgspec.Struct, frozen=True):
    """A Ray that `rushhour deploy` has started on this machine.

    Attributes:
        pid: of its head, which ends all of its processes.
        address: of its key-value store.
    """

    pid: int
    address: str


class Registry:
    """The key-value store of the cluster that this process is connected to."""

    def put_package(self, sha256: str, package: bytes) -> None:
        """Keep a package, if it is not there yet."""
        if self._get(f"run/{sha256}/size") is not None:
            return
        for start in range(0, len(package), _CHUNK):
            self._put(f"run/{sha256}/{start}", package[start : start + _CHUNK])
        self._put(f"run/{sha256}/size", str(len(package)).encode())

    def package(self, sha256: str) -> bytes:
        """A package.

        Raises:
            ServeError: if it is not there.
        """
        size = self._get(f"run/{sha256}/size")
        parts = [self._get(f"run/{sha256}/{start}") for start in range(0, int(size or 0), _CHUNK)]
        if size is None or None in parts:
            raise ServeError("the cluster has no such run", f"its SHA-256 begins with {sha256[:12]}", "deploy it again")
        return b"".join(part for part in parts if part is not None)

    def drop_packages(self) -> None:
        """Drop the packages that no deployment has or had just before."""
        used = set()
        for record in self.records():
            used |= {order.run for order in (record.current, record.previous, record.coming) if order is not None}
        for key in self._keys("run/"):
            if key.split("/")[1] not in used:
                self._delete(key)

    def record(self, name: str) -> Record | None:
        """A deployment, by its name."""
        return self._read(f"deployment/{name}", Record)

    def records(self) -> Iterator[Record]:
        """All deployments."""
        for key in self._keys("deployment/"):
            found = self._read(key, Record)
            if found is not None:
                yield found

    def keep(self, record: Record) -> None:
        """Keep a deployment under its name."""
        self._put(f"deployment/{record.current.name}", msgspec.json.encode(record))

    def forget(self, name: str) -> None:
        """Drop a deployment and what is known of its replicas."""
        self._delete(f"deployment/{name}")
        for key in self._keys(f"replica/{name}/"):
            self._delete(key)
        self.drop_packages()

    def join(self, name: str, replica: Replicated) -> None:
        """Note a replica, or how it has changed."""
        self._put(f"replica/{name}/{replica.id}", msgspec.json.encode(replica))

    def leave(self, name: str, replica: str) -> None:
        """Drop a replica, by its identifier."""
        self._delete(f"replica/{name}/{replica}")

    def replicas(self, name: str) -> list[Replicated]:
        """The replicas of a deployment that are alive; those that were killed are dropped."""
        import ray

        found = []
        for key in sorted(self._keys(f"replica/{name}/")):
            replica = self._read(key, Replicated)
            if replica is None:
                continue
            try:
                ray.get_actor(replica.actor, namespace="serve")
            except ValueError:
                self._delete(key)
                continue
            found.append(replica)
        return found

    @property
    def local(self) -> Local | None:
        """The Ray, if `rushhour deploy` has started it."""
        return self._read(_LOCAL, Local)

    def keep_local(self, local: Local) -> None:
        """Note that `rushhour deploy` has started this Ray."""
        self._put(_LOCAL, msgspec.json.encode(local))

    # The store has no public interface; Ray's own packages of files (runtime_env) are kept in it as well.

    def _put(self, key: str, value: bytes) -> None:
        _store()._internal_kv_put(key.encode(), value, overwrite=True, namespace=_NAMESPACE)

    def _get(self, key: str) -> bytes | None:
        found: bytes | None = _store()._internal_kv_get(key.encode(), namespace=_NAMESPACE)
        return found

    def _delete(self, key: str) -> None:
        _store()._internal_kv_del(key.encode(), namespace=_NAMESPACE)

    def _keys(self, prefix: str) -> list[str]:
        return [key.decode() for key in _store()._internal_kv_list(prefix.encode(), namespace=_NAMESPACE)]

    def _read(self, key: str, kind: type[S]) -> S | None:
        value = self._get(key)
        try:
            return None if value is None else msgspec.json.decode(value, type=kind)
        except msgspec.DecodeError:
            return None  # of another version of Rushhour


def _store() -> Any:
    from ray.experimental import internal_kv

    return internal_kv
