"""`Deployment`: a Plan with what it needs of the machines that serve it, and what the user decides: names and ports."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Final

import msgspec

from rushhour.bundle import Bundle
from rushhour.errors import GoalError, PlanError, ServeError
from rushhour.plan import PLAN, Plan, Variant
from rushhour.serve import Limits, ServeSettings, Target
from rushhour.serve.child import ChildServer
from rushhour.system.storage import explained

DRAIN_DELAY_S: Final = 10
"""Under Kubernetes: endpoints are removed some seconds after a pod gets SIGTERM."""
_DRAIN_TIMEOUT_S: Final = 30
_CLOSING_S: Final = 10
_MIB: Final = 2**20
_STEP_MIB: Final = 64
_MARGIN: Final = 1.25
_LONGEST_NAME: Final = 53
"""A DNS label has 63 characters, and KServe appends `-predictor`."""
_NAME: Final = re.compile(rf"[a-z](?:[a-z0-9-]{{0,{_LONGEST_NAME - 2}}}[a-z0-9])?")
_IMAGE: Final = re.compile(
    r"(?:[a-zA-Z0-9][a-zA-Z0-9.-]*(?::\d+)?/)?"
    r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*"
    r"(?::[\w][\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
"""Source: the grammar of github.com/distribution/reference."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A Plan on some machines.

    Attributes:
        name: a DNS label.
        image: of the container.
        port: of HTTP.
        grpc_port: None serves over HTTP only.
        replicas: containers.
        model: the model's name in requests.
        plan: with the variants that are served, all of which are compiled.
        bundles: of these variants.
        memory_mib: of one container.
    """

    name: str
    image: str
    port: int
    grpc_port: int | None
    replicas: int
    model: str
    plan: Plan
    bundles: tuple[tuple[Variant, Bundle], ...]
    memory_mib: int

    @classmethod
    def of(
        cls,
        target: Target,
        *,
        name: str,
        image: str | None,
        port: int,
        grpc_port: int | None,
        replicas: int,
        memory_mib: int,
    ) -> Deployment:
        """A target with what the user decides.

        Args:
            target: a run or a plan.
            name: of the deployment.
            image: `NAME:` and the first characters of the bundle's hash by default.
            port: of HTTP, from 1 to 65,535.
            grpc_port: likewise; another one.
            replicas: at least 1.
            memory_mib: of one container.

        Raises:
            GoalError: if a name, port or number cannot be used.
            PlanError: if the plan serves the network as torch runs it.
            BundleError: if a bundle is missing or damaged.
        """
        for what, number, most in (
            ("port", port, 65_535),
            ("grpc_port", grpc_port, 65_535),
            ("replicas", replicas, 1000),
        ):
            if number is not None and not 1 <= number <= most:
                raise GoalError(f"cannot use {what}={number!r}", f"it is from 1 to {most:,}", "give another number")
        if port == grpc_port:
            raise GoalError("port and grpc_port are both " + str(port), "each needs a port of its own", "change one")
        _check_name(name)
        plan, bundles = _compiled(target)
        image = image or f"{name}:{target.bundle.manifest.hash[:12]}"
        if not _IMAGE.fullmatch(image):
            raise GoalError(
                f"cannot use the image {image!r}",
                "it is [HOST/]PATH[:TAG], in lower case but for the tag",
                "write for example registry.example.com/team/parts:1",
            )
        return cls(
            name=name,
            image=image,
            port=port,
            grpc_port=grpc_port,
            replicas=replicas,
            model=target.name,
            plan=plan,
            bundles=bundles,
            memory_mib=memory_mib,
        )

    @property
    def cpus(self) -> int:
        """Cores of one container: one for each thread of the engine, and one for each cell's event loop if the machine
        that the Plan was measured on had one left for it."""
        policy = self.plan.policy
        engine = policy.cells * policy.streams * policy.threads
        measured = 0 if self.plan.evidence is None else self.plan.evidence.machine.cores
        return max(engine, min(measured, engine + policy.cells))

    def grace_s(self, drain_delay_s: int) -> int:
        """Seconds from SIGTERM to the end, at most: what the orchestrator has to wait."""
        return drain_delay_s + _DRAIN_TIMEOUT_S + _CLOSING_S

    @property
    def facts(self) -> dict[str, str]:
        """What the Plan decides, by name."""
        plan, policy = self.plan, self.plan.policy
        found = {
            "model": self.model,
            "variant": plan.variants[0].name,
            "bundle": plan.variants[0].bundle_hash[:12],
            "slo": str(plan.goal.slo),
            "cells": str(policy.cells),
            "streams": str(policy.streams),
            "threads": str(policy.threads),
            "max-batch": str(policy.max_batch),
            "queue-bound": str(policy.queue_bound),
        }
        if policy.deadline_ms is not None:
            found["deadline-ms"] = f"{policy.deadline_ms:g}"
        if plan.evidence is not None:
            found["capacity-rps"] = f"{plan.evidence.capacity_rps:.0f}"
            found["measured-on"] = str(plan.evidence.machine)
        return found


def _check_name(name: str) -> None:
    """Raise unless a deployment may have this name.

    Raises:
        GoalError: if it is no DNS label that KServe accepts.
    """
    if not _NAME.fullmatch(name):
        raise GoalError(
            f"cannot use the name {name!r}",
            f"it is a DNS label: a letter, then a-z, 0-9 and '-' between them, {_LONGEST_NAME} characters at most, "
            "because KServe appends to it",
            "write for example parts-2026",
        )


def default_name(model: str) -> str:
    """A DNS label from a model's name."""
    label = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    label = label if label[:1].isalpha() else f"model-{label}"
    return label[:_LONGEST_NAME].strip("-")


def memory_of(target: Target, *, grpc: bool = False) -> int:
    """MiB that one container needs: the server is started here as the Plan says, and its peak is read.

    At its start the largest batch runs on all streams. A quarter is added, and the bytes that requests may hold.

    Args:
        target: what is served.
        grpc: whether over gRPC too.

    Raises:
        ServeError: if it does not start on this machine.
    """
    try:
        server = ChildServer(target.path, ServeSettings(http_port=0, grpc_port=0 if grpc else None))
    except ServeError as error:
        raise ServeError(
            "cannot measure the memory that the Plan needs",
            error.why,
            "export where the Plan was made, or give the memory with --memory 1GiB",
        ) from error
    try:
        peak = sum(map(_peak_bytes, _processes(server.pid)))
    finally:
        server.close()
    held = target.plan.policy.cells * Limits().held_bytes
    return _STEP_MIB * math.ceil((peak * _MARGIN + held) / _MIB / _STEP_MIB)


def _processes(pid: int) -> list[int]:
    """A process and its children: of several cells, the supervisor is their parent."""
    with explained("read /proc"):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def _peak_bytes(pid: int) -> int:
    """The largest resident memory of a process so far."""
    with explained("read /proc"):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def write_run(folder: Path, deployment: Deployment) -> None:
    """Write the plan of a deployment, and the bundles that it serves, as a run.

    Args:
        folder: new.
        deployment: what is served.

    Raises:
        StorageError: if it cannot be written.
    """
    deployment.plan.save(folder / PLAN)
    for variant, bundle in deployment.bundles:
        place = folder / variant.bundle
        if not place.exists():
            _copy(bundle, place)


def _copy(bundle: Bundle, place: Path) -> None:
    """The files of a bundle as they are: the Plan names it by their hash."""
    with explained(f"copy {bundle.path}"):
        place.mkdir(parents=True)
        for name in ("bundle.json", *bundle.manifest.files):
            shutil.copyfile(bundle.path / name, place / name)


def _compiled(target: Target) -> tuple[Plan, tuple[tuple[Variant, Bundle], ...]]:
    """The plan with its compiled variants, and their bundles.

    Raises:
        PlanError: if the first is not compiled.
    """
    plan, first = target.plan, target.plan.variants[0]
    if target.folder == target.bundle.path:
        raise PlanError(
            f"{target.path} is a bundle, not a run",
            "cores, memory and admission follow from a Plan, and it has none",
            "make one with `rushhour tune`, and export that run",
        )
    if first.engine == "torch":
        raise PlanError(
            f"cannot export the plan of {target.path}",
            f"its variant {first.name} runs the network's own code on torch, which a slim container has not",
            "export a plan whose first variant is on openvino or onnxruntime",
        )
    kept = tuple(variant for variant in plan.variants if variant.engine != "torch")
    bundles = tuple((variant, target.bundle_of(variant)) for variant in kept)
    names = {variant.name for variant in kept}
    ladder = tuple(point for point in plan.ladder if point.variant in names)
    ladder = ladder if len(ladder) > 1 else ()
    return msgspec.structs.replace(plan, variants=kept, ladder=ladder, model=target.name), bundles
