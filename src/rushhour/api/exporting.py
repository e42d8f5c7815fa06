"""The verb `export`: a run becomes a container context, a compose file, manifests for KServe."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rushhour.api.values import StrPath, read_path
from rushhour.errors import GoalError, StorageError
from rushhour.system.storage import check_own_file, try_building, try_file, write_own

_MIB: Final = 2**20
_LEAST_MIB: Final = 64


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written, and what one container needs.

    Attributes:
        docker: the context's folder; None where it was not asked for, as the next two.
        kserve: the file with ServingRuntime and InferenceService.
        compose: the compose file.
        name: of the deployment.
        image: that the manifests run.
        model: the model's name in requests.
        cpus: of one container.
        memory_mib: of one container.
        replicas: containers.
        requirements: the pinned packages of the container.
        plan: what the Plan decides, by name: cells, streams, threads, admission, capacity.
    """

    docker: Path | None
    kserve: Path | None
    compose: Path | None
    name: str
    image: str
    model: str
    cpus: int
    memory_mib: int
    replicas: int
    requirements: tuple[str, ...]
    plan: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour export --json` writes."""
        places = {name: str(place) for name in ("docker", "kserve", "compose") if (place := getattr(self, name))}
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[3:]}
        return {**places, **rest}


def export(
    run: StrPath,
    *,
    docker: StrPath | None = None,
    kserve: StrPath | None = None,
    compose: StrPath | None = None,
    name: str | None = None,
    image: str | None = None,
    port: int = 8080,
    grpc_port: int | None = None,
    replicas: int = 1,
    memory: float | None = None,
    force: bool = False,
) -> ExportResult:
    """Write what serves a run's Plan elsewhere: a container context, a compose file, manifests for KServe.

    Cores, memory, layout and admission come from the Plan together. The container has the plan, the bundles that it
    serves, and pinned versions of the packages that the server imports: no torch.

        rushhour.export("runs/photos", docker="photos-image", compose="compose.yaml")
        rushhour.export(tuned, kserve="photos.yaml", image="registry.example.com/photos:1", replicas=3)

    Args:
        run: a run's folder, a plan's file, or the result of `tune`.
        docker: the folder of the context: new, empty or an older export.
        kserve: the file with a ServingRuntime and an InferenceService.
        compose: the compose file; it builds the image from `docker`, if that is given too.
        name: of the deployment, a DNS label; from the model's name by default.
        image: of the container; `NAME:` and the first characters of the bundle's hash by default.
        port: of HTTP in the container.
        grpc_port: of gRPC in the container; None serves over HTTP only.
        replicas: containers.
        memory: bytes of one container. By default the server is started here as the Plan says, and its peak is
            measured.
        force: replace an older export. Nothing else is ever replaced.

    Raises:
        PlanError: if there is no plan at `run`, or it serves the network on torch.
        BundleError: if a bundle is damaged, or not the one that the plan was made for.
        GoalError: if nothing is asked for, or a name or number cannot be used.
        EngineError: if a package that the container needs is not installed here.
        ServeError: if the memory cannot be measured, because the Plan cannot be served here.
        StorageError: if a place holds anything else, or cannot be written.
    """
    from rushhour.cluster import (
        Deployment,
        check_context,
        compose_file,
        default_name,
        is_manifest,
        kserve_file,
        memory_of,
        packages_of,
        write_context,
    )
    from rushhour.serve import open_target

    context, manifests, composed = (None if place is None else read_path(place) for place in (docker, kserve, compose))
    _check_apart(context, manifests, composed)
    if context is not None:
        try_building(context)
        check_context(context, force=force)
    for file in (manifests, composed):
        if file is not None:
            try_file(file)
            _check_file(file, is_manifest, force)
    memory_mib = None if memory is None else math.ceil(memory / _MIB)
    if memory_mib is not None and memory_mib < _LEAST_MIB:
        raise GoalError(f"cannot use memory={memory!r}", f"it is {_LEAST_MIB} MiB at least", "write for example 1GiB")
    target = open_target(read_path(run))
    deployment = Deployment.of(
        target,
        name=name if name is not None else default_name(target.name),
        image=image,
        port=port,
        grpc_port=grpc_port,
        replicas=replicas,
        memory_mib=memory_mib or 0,
    )
    pinned = packages_of(deployment)
    if memory_mib is None:
        deployment = dataclasses.replace(deployment, memory_mib=memory_of(target, grpc=grpc_port is not None))
    if context is not None:
        write_context(context, deployment, force=force)
    if manifests is not None:
        write_own(manifests, kserve_file(deployment).encode(), is_manifest)
    if composed is not None:
        text = compose_file(deployment, context=context, beside=composed.parent)
        write_own(composed, text.encode(), is_manifest)
    return ExportResult(
        docker=context,
        kserve=manifests,
        compose=composed,
        name=deployment.name,
        image=deployment.image,
        model=deployment.model,
        cpus=deployment.cpus,
        memory_mib=deployment.memory_mib,
        replicas=deployment.replicas,
        requirements=pinned,
        plan=deployment.facts,
    )


def _check_apart(*places: Path | None) -> None:
    """Raise unless there are places, and none is in another.

    Raises:
        GoalError: if there are none, or two that cannot both be written.
    """
    given = [place for place in places if place is not None]
    if not given:
        raise GoalError("nothing to export", "no place is named", "give --docker DIR, --kserve FILE or --compose FILE")
    for one, other in itertools.permutations([place.resolve() for place in given], 2):
        if one == other or one in other.parents:
            why = "both have the same name" if one == other else "the folder of a container has no other files"
            raise GoalError(f"cannot write both {one} and {other}", why, "name places that are apart")


def _check_file(file: Path, is_own: Callable[[bytes], bool], force: bool) -> None:
    """Raise unless the file may be written: it is missing or empty, or with `force` an older export.

    Raises:
        StorageError: if there is anything else.
    """
    check_own_file(file, is_own)
    if file.is_file() and file.stat().st_size and not force:
        raise StorageError(f"there is an export at {file} already", "it may be in use", "name another, or set --force")
