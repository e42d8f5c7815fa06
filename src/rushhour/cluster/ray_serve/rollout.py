"""Deployments on Ray Serve: made, updated replica by replica, undone, deleted; and how they are."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from rushhour.cluster.ray_client import why_of
from rushhour.cluster.ray_serve.head import free_places
from rushhour.cluster.ray_serve.order import Order
from rushhour.cluster.ray_serve.registry import Record, Registry, Replicated
from rushhour.cluster.ray_serve.replica import CLOSING_S, DRAIN_S, FAILED, Replica
from rushhour.errors import ServeError

_LOOK_S: Final = 0.2
_ONGOING: Final = 1000
"""Requests through the proxy that a replica takes at the same time: its server decides which it answers."""
_PUSH_S, _LOOK_BACK_S, _SCALE_UP_S = 1.0, 5.0, 2.0
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 1.0, 5.0
_POLICY: Final = "rushhour.cluster.ray_serve.scaling:Goodput"
_SERVICER: Final = "rushhour.cluster.ray_serve.forwarding.add_servicer"

Say = Callable[[str], None]


class State(msgspec.Struct, frozen=True):
    """How a deployment is.

    Attributes:
        name: of the deployment.
        state: `ready`, `changing` (replicas start or drain), or `unhealthy` (fewer than there should be).
        plan: the SHA-256 of the plan that is deployed.
        previous: of the one before, which an undo goes back to; None where there is none.
        least: fewest replicas.
        most: most replicas.
        cpus: of each.
        model: the model's name in requests.
        proxy: the address behind which Ray's proxy spreads requests; None where there is no proxy.
        proxy_grpc: likewise over gRPC, with the metadata `application: NAME`.
        replicas: those that are alive.
        message: Ray's, where something is wrong.
    """

    name: str
    state: str
    plan: str
    previous: str | None
    least: int
    most: int
    cpus: int
    model: str
    proxy: str | None
    proxy_grpc: str | None
    replicas: tuple[Replicated, ...]
    message: str = ""


def deploy(
    registry: Registry,
    order: Order,
    package: bytes,
    *,
    proxy_port: int,
    proxy_grpc_port: int | None,
    timeout_s: float,
    say: Say,
) -> State:
    """Deploy, or update what is deployed under this name: a replica ends after its successor is ready.

    Args:
        registry: of the cluster.
        order: what is deployed.
        package: of its run.
        proxy_port: of Ray's HTTP proxy; it has no effect where Ray Serve runs already.
        proxy_grpc_port: likewise of its gRPC proxy; None for none.
        timeout_s: in which all replicas are to be ready; else what was deployed before stays.
        say: is told what happens.

    Raises:
        ServeError: if there are too few CPUs, the route is taken, or the replicas do not get ready.
    """
    record = registry.record(order.name)
    before = None if record is None else record.current
    _check_route(registry, order)
    if before == order and status(registry, order.name).state == "ready":
        say(f"{order.name} is deployed already, from this plan and with these options")
        return status(registry, order.name)
    surge = _check_room(order, before)
    _start_serve(order, proxy_port, proxy_grpc_port)
    registry.keep(Record(order) if record is None else msgspec.structs.replace(record, coming=order))
    registry.put_package(order.run, package)
    _roll(registry, order, record, surge=surge, timeout_s=timeout_s, say=say)
    return status(registry, order.name)


def undo(registry: Registry, name: str, *, timeout_s: float, say: Say) -> State:
    """Go back to what was deployed before, replica by replica; once more goes forward again.

    Raises:
        ServeError: if there is no such deployment, nothing before it, or the replicas do not get ready.
    """
    record = _known(registry, name)
    if record.previous is None:
        raise ServeError(f"cannot undo {name}", "nothing was deployed under this name before", "deploy another run")
    surge = _check_room(record.previous, record.current)
    registry.keep(msgspec.structs.replace(record, coming=record.previous))
    _roll(registry, record.previous, record, surge=surge, timeout_s=timeout_s, say=say)
    return status(registry, name)


def delete(registry: Registry, name: str) -> bool:
    """End a deployment: its replicas drain, then nothing of it is left. Whether no other is left on this cluster.

    Raises:
        ServeError: if there is no such deployment, or its replicas do not end.
    """
    from ray import serve

    record = _known(registry, name)
    longest_s = record.current.drain_delay_s + DRAIN_S + CLOSING_S + 15
    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + longest_s
    while name in _applications() or registry.replicas(name):
        if time.monotonic() > deadline:
            raise ServeError(
                f"{name} does not end", f"its replicas have not ended in {longest_s:g} s", "see Ray's logs"
            )
        time.sleep(_LOOK_S)
    registry.forget(name)
    return next(registry.records(), None) is None


def status(registry: Registry, name: str) -> State:
    """How a deployment is.

    Raises:
        ServeError: if there is no such deployment.
    """
    record = _known(registry, name)
    order, replicas = record.current, registry.replicas(name)
    application = _applications().get(name)
    ready = [each for each in replicas if each.state == "ready" and each.plan == order.plan]
    state, message = "unhealthy", "Ray Serve has no such application" if application is None else ""
    if application is not None:
        if len(ready) >= order.replicas[0]:
            changing = len(ready) != len(replicas) or application.status != "RUNNING" or record.coming is not None
            state = "changing" if changing else "ready"
        message = _reason(application) if application.status in ("DEPLOY_FAILED", "UNHEALTHY") else ""
    http, grpc = _proxies(order) if application is not None else (None, None)
    return State(
        name=name,
        state=state,
        plan=order.plan,
        previous=None if record.previous is None else record.previous.plan,
        least=order.replicas[0],
        most=order.replicas[1],
        cpus=order.cpus,
        model=order.model,
        proxy=http,
        proxy_grpc=grpc,
        replicas=tuple(replicas),
        message=message,
    )


def _known(registry: Registry, name: str) -> Record:
    record = registry.record(name)
    if record is None:
        names = ", ".join(sorted(each.current.name for each in registry.records()))
        there = f"there are {names}" if names else "there is none on this Ray"
        raise ServeError(
            f"no deployment is called {name!r}", there, "deploy one: rushhour deploy RUN --ray --name NAME"
        )
    return record


def _check_route(registry: Registry, order: Order) -> None:
    for other in registry.records():
        if other.current.name != order.name and other.current.route == order.route:
            raise ServeError(
                f"the route {order.route} is that of the deployment {other.current.name}",
                "Ray's proxy needs one for each",
                f"give --route /{order.name}, or --name {other.current.name} to update that one",
            )


def _check_room(order: Order, before: Order | None) -> bool:
    """Whether an update has room for one more replica while it lasts.

    Raises:
        ServeError: if the cluster has too few CPUs.
    """
    whole, now, largest = free_places(order.cpus)
    least = order.replicas[0]
    needs = f"{least} replicas of {order.cpus} CPUs" if least > 1 else f"{order.cpus} CPUs"
    if whole < least:
        why = f"the largest node has {largest}" if largest < order.cpus else f"there is room for {whole} in all"
        raise ServeError(
            f"the cluster has too few CPUs for {needs}", why, "add nodes, or tune for fewer cores or replicas"
        )
    if before is None:
        if now < least:
            why = f"there is room for {now} of {whole}: others use the rest"
            raise ServeError(f"the cluster has too few free CPUs for {needs}", why, "end others, or add nodes")
        return True
    if now < 1 and before.replicas[0] < 2:
        raise ServeError(
            f"cannot update {order.name} without an interruption",
            f"its one replica ends after its successor is ready, which needs {order.cpus} free CPUs",
            "add a node, or deploy with 2 replicas",
        )
    return now >= 1


def _start_serve(order: Order, port: int, grpc_port: int | None) -> None:
    """Start Ray Serve, unless it runs."""
    from ray import serve

    if serve.status().proxies or serve.status().applications:
        return
    alone = not order.exposed and order.host.startswith(("127.", "localhost", "::1"))
    grpc = None if grpc_port is None else {"port": grpc_port, "grpc_servicer_functions": [_SERVICER]}
    try:
        serve.start(
            proxy_location="HeadOnly" if alone else "EveryNode",
            http_options={"host": order.host, "port": port},
            grpc_options=grpc,
            logging_config={"enable_access_log": False},
        )
    except Exception as error:  # of many kinds
        raise ServeError("Ray Serve does not start", why_of(error), "see Ray's logs") from error


def _roll(registry: Registry, order: Order, record: Record | None, *, surge: bool, timeout_s: float, say: Say) -> None:
    """Bring the replicas to an order; back to what the record has, where that fails.

    Raises:
        ServeError: with the reason of the replica.
    """
    before = None if record is None else record.current
    try:
        if before is not None:
            say(f"updating {order.name}" + ("" if surge else ", one replica at a time: no CPUs are free for another"))
        _run(order, surge)
        _await(registry, order, timeout_s, say)
    except ServeError as error:
        kept = "nothing is deployed"
        if record is None:
            _delete_failed(registry, order.name)
        else:
            kept = "what was deployed before still serves"
            with contextlib.suppress(ServeError):
                _run(record.current, surge)
                _await(registry, record.current, timeout_s, say)
            registry.keep(msgspec.structs.replace(record, coming=None))
        registry.drop_packages()
        raise ServeError(error.what, error.why, error.fix or kept) from error
    registry.keep(Record(order, before))
    registry.drop_packages()


def _delete_failed(registry: Registry, name: str) -> None:
    """Remove what is left of a deployment that did not get ready."""
    from ray import serve

    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + DRAIN_S
    while name in _applications() and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    registry.forget(name)


def _run(order: Order, surge: bool) -> None:
    """Tell Ray Serve what there is to be, without waiting for it."""
    from ray import serve

    least, most = order.replicas
    how: dict[str, Any] = {"num_replicas": least}
    if order.is_scaled:
        policy = {"capacity_rps": order.capacity_rps, "limit_s": order.limit_s}
        how = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "look_back_period_s": _LOOK_BACK_S,
                "upscale_delay_s": _SCALE_UP_S,
                "downscale_delay_s": order.scale_down_s,
                "policy": {"policy_function": _POLICY, "policy_kwargs": policy},
            }
        }
    deployment = serve.deployment(
        Replica,
        name="replica",
        ray_actor_options={
            "num_cpus": order.cpus,
            "runtime_env": {"env_vars": {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": f"{_PUSH_S:g}"}},
        },
        max_ongoing_requests=_ONGOING,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=order.drain_delay_s + DRAIN_S + CLOSING_S + 5,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        max_constructor_retry_count=2,
        max_surge_percent=max(1, 100 // most) if surge else 0,
        **how,
    )
    application = deployment.bind(msgspec.json.encode(order).decode())
    try:
        serve.run_many(
            [serve.RunTarget(application, name=order.name, route_prefix=order.route)],
            wait_for_applications_running=False,
        )
    except Exception as error:  # of many kinds
        raise ServeError(f"Ray Serve does not take {order.name}", why_of(error)) from error


def _await(registry: Registry, order: Order, timeout_s: float, say: Say) -> None:
    """Wait until the replicas are those of the order.

    Raises:
        ServeError: if they do not get ready.
    """
    deadline, told = time.monotonic() + timeout_s, -1
    while True:
        application = _applications().get(order.name)
        replicas = registry.replicas(order.name)
        ready = [each for each in replicas if each.plan == order.plan and each.state == "ready"]
        if application is not None and application.status == "DEPLOY_FAILED":
            raise ServeError(f"the replicas of {order.name} do not start", _reason(application))
        enough = len(ready) >= order.replicas[0] and len(ready) == len(replicas)
        if application is not None and application.status == "RUNNING" and enough:
            return
        if len(ready) != told:
            told = len(ready)
            say(f"{told} of {order.replicas[0]} replicas are ready")
        if time.monotonic() > deadline:
            why = f"{len(ready)} of {order.replicas[0]} are ready after {timeout_s:g} s"
            reason = "" if application is None else _reason(application)
            raise ServeError(f"the replicas of {order.name} do not get ready", f"{why}. {reason}".rstrip(". "))
        time.sleep(_LOOK_S)


def _applications() -> dict[str, Any]:
    from ray import serve

    found: dict[str, Any] = serve.status().applications
    return found


def _reason(application: Any) -> str:
    """Why an application is not well, in one line: what a replica of ours says, else the last line of Ray's."""
    text = "\n".join([application.message, *(each.message for each in application.deployments.values())])
    ours = re.findall(rf"{FAILED}(.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ours[-1] if ours else lines[-1][:300] if lines else ""


def _proxies(order: Order) -> tuple[str | None, str | None]:
    """Where Ray's proxies answer."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None, None
    details = client.get_serve_details()
    if details.get("proxy_location") == "Disabled":
        return None, None
    options = details.get("http_options") or {}
    grpc = details.get("grpc_options") or {}
    host = options.get("host") or "127.0.0.1"
    if host in ("0.0.0.0", "::"):
        import ray

        host = ray.util.get_node_ip_address()
    http = f"http://{host}:{options.get('port')}{order.route.rstrip('/')}"
    return http, f"{host}:{grpc['port']}" if grpc.get("grpc_servicer_functions") and order.grpc else None
