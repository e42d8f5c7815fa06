"""The verb `deploy`: a run's Plan on a Ray cluster, as replicas that are updated without a lost request."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

from rushhour.api.values import StrPath, read_path, read_seconds
from rushhour.errors import GoalError, PlanError, ServeError
from rushhour.progress import Progress, Silent

if TYPE_CHECKING:
    from rushhour.cluster.ray_serve import Order, Replicated, State

_LONGEST_DRAIN_S = 3600.0


class Deployed:
    """A deployment on Ray Serve. It lives on the cluster: nothing here has to stay open.

    Attributes:
        name: of the deployment.
        ray: the address of its cluster; None for the one of this machine.
    """

    def __init__(self, state: State, ray: str | None) -> None:
        self.name = state.name
        self.ray = ray
        self._state = state

    @property
    def state(self) -> str:
        """`ready`, `changing` or `unhealthy`, as the last call found it."""
        return self._state.state

    @property
    def plan(self) -> str:
        """The SHA-256 of the plan that is deployed."""
        return self._state.plan

    @property
    def replicas(self) -> tuple[Replicated, ...]:
        """Those that are alive, with the addresses at which clients reach them directly."""
        return self._state.replicas

    @property
    def urls(self) -> tuple[str, ...]:
        """Where replicas that take requests answer over HTTP: for clients that spread requests themselves."""
        return tuple(each.http for each in self.replicas if each.state == "ready")

    @property
    def proxy(self) -> str | None:
        """The one address behind which Ray's proxy spreads requests."""
        return self._state.proxy

    def status(self) -> Deployed:
        """How it is now.

        Raises:
            ServeError: if there is no such deployment any more.
        """
        return deployed(self.name, ray=self.ray)

    def undo(self, *, timeout: str | float = "3m", progress: Progress | None = None) -> Deployed:
        """Go back to what was deployed before, replica by replica, without a lost request.

        Raises:
            ServeError: if nothing was, or its replicas do not get ready.
        """
        from rushhour.cluster.ray_serve import connected, undo

        with connected(self.ray) as registry:
            how: dict[str, Any] = {"timeout_s": read_seconds(timeout), "say": (progress or Silent()).note}
            return Deployed(undo(registry, self.name, **how), self.ray)

    def delete(self) -> None:
        """End it: its replicas answer what they have, then nothing of it is left. A Ray that `deploy` has started ends
        with its last deployment.

        Raises:
            ServeError: if there is no such deployment, or its replicas do not end.
        """
        from rushhour.cluster.ray_serve import connected, delete, stop

        with connected(self.ray) as registry:
            last, local = delete(registry, self.name), registry.local
        if last and local is not None:
            stop(local)

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour deploy --json` writes."""
        found: dict[str, Any] = msgspec.to_builtins(self._state)
        return found

    def __repr__(self) -> str:
        ready = len(self.urls)
        return f"<rushhour.api.Deployed {self.name}, {self.state}, {ready} replicas of plan {self.plan[:12]}>"


def deploy(
    run: StrPath,
    *,
    ray: str | None = None,
    name: str | None = None,
    replicas: int | str = "1",
    host: str = "127.0.0.1",
    expose: bool = False,
    ports: str | None = None,
    grpc: bool = True,
    route: str = "/",
    proxy_port: int = 8000,
    proxy_grpc_port: int | None = None,
    drain_delay: str | float = "5s",
    scale_down_after: str | float = "60s",
    timeout: str | float = "3m",
    progress: Progress | None = None,
) -> Deployed:
    """Deploy a run's Plan on Ray Serve, or update what is deployed under this name without a lost request.

    Each replica owns a whole `rushhour serve` process with the cores that the Plan needs; clients reach it directly, or
    through Ray's proxy. A replica ends after its successor is ready.

        deployed = rushhour.deploy("runs/photos", replicas="2..8")
        print(deployed.urls, deployed.proxy)
        deployed.undo()

    Args:
        run: a run's folder, a plan's file, or the result of `tune`.
        ray: `HOST:PORT` of the cluster, from one of its machines. By default the Ray that runs on this machine; where
            none does, one is started on loopback.
        name: of the deployment, a DNS label; from the model's name by default.
        replicas: how many, or `2..8`: as many as goodput and waits need.
        host: that replicas and proxies listen on.
        expose: listen beyond loopback, because a proxy or firewall controls access.
        ports: `FIRST-LAST` on each node, for replicas; any free ones by default.
        grpc: whether replicas serve over gRPC too.
        route: the path of this deployment behind Ray's proxy.
        proxy_port: of Ray's HTTP proxy, where Ray Serve is not running yet.
        proxy_grpc_port: likewise of its gRPC proxy; None for none.
        drain_delay: time, `5s` or seconds, in which a replica that is to end still takes requests, while its address
            is withdrawn.
        scale_down_after: time, likewise, of a low load before a replica is ended.
        timeout: in which the replicas are to be ready; else what was deployed before stays.
        progress: is told what happens.

    Raises:
        InstallError: if Ray is not installed (extra `cluster`).
        PlanError: if there is no plan at `run`, it meets no goal, or it serves the network on torch.
        BundleError: if a bundle is damaged, or not the one that the plan was made for.
        GoalError: if a name or number cannot be used.
        ServeError: if the cluster does not answer, has too few CPUs, or the replicas do not get ready.
    """
    from rushhour.cluster.ray_serve import connected
    from rushhour.cluster.ray_serve import deploy as deploy_on

    timeout_s = read_seconds(timeout)
    order, package = _ordered(
        run,
        name=name,
        replicas=replicas,
        host=host,
        expose=expose,
        ports=ports,
        grpc=grpc,
        route=route,
        drain_delay_s=0.0 if drain_delay in (0, "0", "0s") else read_seconds(drain_delay),
        scale_down_s=read_seconds(scale_down_after),
    )
    told = progress or Silent()
    with connected(ray, start=True, say=told.note) as registry:
        state = deploy_on(
            registry,
            order,
            package,
            proxy_port=proxy_port,
            proxy_grpc_port=proxy_grpc_port,
            timeout_s=timeout_s,
            say=told.note,
        )
    return Deployed(state, ray)


def deployed(name: str, *, ray: str | None = None) -> Deployed:
    """What is deployed under a name: its state, replicas and addresses.

    Args:
        name: of the deployment.
        ray: as for `deploy`.

    Raises:
        InstallError: if Ray is not installed (extra `cluster`).
        ServeError: if no Ray answers, or there is no such deployment.
    """
    from rushhour.cluster.ray_serve import connected, status

    with connected(ray) as registry:
        return Deployed(status(registry, name), ray)


def _ordered(
    run: StrPath,
    *,
    name: str | None,
    replicas: int | str,
    host: str,
    expose: bool,
    ports: str | None,
    grpc: bool,
    route: str,
    drain_delay_s: float,
    scale_down_s: float,
) -> tuple[Order, bytes]:
    """What is deployed, with the package of its run.

    Raises:
        PlanError, BundleError, GoalError, ServeError: as `deploy`.
    """
    from rushhour.cluster import Deployment, default_name
    from rushhour.cluster.ray_serve import Order, digest, pack, plan_of, read_ports, read_replicas
    from rushhour.serve import open_target
    from rushhour.serve.access.exposure import check_host, is_loopback

    least, most = read_replicas(replicas)
    given = None if ports is None else read_ports(ports, each=2 if grpc else 1)
    if not route.startswith("/") or (route != "/" and route.endswith("/")) or set(route) & set("{}?# "):
        raise GoalError(f"cannot use route={route!r}", "it is a path as / or /photos", "write for example /photos")
    if not 0 <= drain_delay_s <= _LONGEST_DRAIN_S:
        raise GoalError(f"cannot use drain_delay={drain_delay_s!r}", "it is from 0 to 3600 s", "write for example 5")
    check_host(host, "--ports")
    if not (expose or is_loopback(host)):
        raise ServeError(
            f"cannot listen on {host}",
            "anyone who can connect could use the model",
            "give --expose, if a proxy or firewall controls access",
        )
    target = open_target(read_path(run))
    plan = target.plan
    if not plan.feasible:
        raise PlanError(
            f"will not deploy the plan of {target.path}",
            f"it is the nearest miss: no plan met {plan.goal.slo} and the accuracy budget",
            "tune again with another goal",
        )
    deployment = Deployment.of(
        target,
        name=name if name is not None else default_name(target.name),
        image=None,
        port=1,
        grpc_port=None,
        replicas=least,
        memory_mib=0,
    )
    policy, evidence, package = plan.policy, plan.evidence, pack(deployment)
    order = Order(
        name=deployment.name,
        run=digest(package),
        plan=plan_of(package),
        version=version("rushhour"),
        model=deployment.model,
        cpus=deployment.cpus,
        cells=policy.cells,
        streams=policy.streams,
        threads=policy.threads,
        limit_s=plan.goal.slo.limit_s,
        capacity_rps=evidence.capacity_rps or None if evidence is not None else None,
        replicas=(least, most),
        host=host,
        exposed=expose,
        ports=given,
        grpc=grpc,
        route=route,
        drain_delay_s=drain_delay_s,
        scale_down_s=scale_down_s,
    )
    return order, package
