"""`rushhour export`: a run becomes a container context, a compose file, manifests for KServe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rushhour.cli.command import Command, option, options
from rushhour.cli.places import Place
from rushhour.cli.quantities import MEMORY
from rushhour.cli.results import json_option, write_json
from rushhour.system.storage import try_building, try_file

_PORT = click.IntRange(1, 65_535)
_PLACES, _NAMES, _SIZE = "What is written", "Names and ports", "Size"

_place_options = options(
    option("--docker", type=Place(try_building), metavar="DIR", section=_PLACES,
           help="The context of a container: Dockerfile, pinned requirements, the plan, the bundles that it serves."),
    option("--kserve", type=Place(try_file), metavar="FILE", section=_PLACES,
           help="A ServingRuntime and an InferenceService for KServe."),
    option("--compose", type=Place(try_file), metavar="FILE", section=_PLACES,
           help="A compose file. With --docker it builds the image from there."),
    option("--force", is_flag=True, section=_PLACES, help="Replace an older export. Nothing else is ever replaced."),
)  # fmt: skip

_name_options = options(
    option("--name", metavar="NAME", section=_NAMES,
           help="Of the deployment: a DNS label. From the model's name by default."),
    option("--image", metavar="IMAGE", section=_NAMES,
           help="That the manifests run. NAME and the first characters of the bundle's hash by default."),
    option("--port", default=8080, show_default=True, type=_PORT, metavar="PORT", section=_NAMES,
           help="Port of HTTP in the container."),
    option("--grpc-port", type=_PORT, metavar="PORT", section=_NAMES,
           help="Port of gRPC in the container. HTTP only by default."),
)  # fmt: skip

_size_options = options(
    option("--replicas", default=1, show_default=True, type=click.IntRange(1, 1000), metavar="N", section=_SIZE,
           help="Containers."),
    option("--memory", type=MEMORY, metavar="SIZE", section=_SIZE,
           help="Memory of one container. By default the server is started here once, and its peak is measured."),
)  # fmt: skip


@click.command("export", cls=Command, short_help="Write a container, a compose file, KServe manifests.")
@click.argument("run", type=Place(), metavar="RUN|PLAN")
@json_option
@_place_options
@_name_options
@_size_options
def command(run: Path, json_file: Path | None, **options: Any) -> None:
    """Write what serves the Plan of RUN elsewhere. At least one of --docker, --kserve and --compose is needed.

    CPUs, memory, cells, streams, threads and admission come from the Plan together. The container runs as a user that
    is not root on a read-only file system, and has neither torch nor anything else that only training needs. It drains
    on SIGTERM, as Kubernetes and Docker expect. Do not scale it by CPU use: a server that keeps its limit may be full
    at any. More in docs/deployment.md.

    \b
    Examples:
      rushhour export runs/demo --docker image --compose compose.yaml
      docker compose -f compose.yaml up --build

    \b
      rushhour export runs/demo --docker image --kserve kserve.yaml --image registry.example.com/demo:1
      docker build -t registry.example.com/demo:1 image
      kubectl apply -f kserve.yaml
    """
    from rushhour.api import export

    result = export(run, **options)
    for kind, place in (("container", result.docker), ("KServe", result.kserve), ("compose", result.compose)):
        if place is not None:
            click.echo(f"{kind:<10} {place}")
    click.echo(
        f"{result.name}: {result.replicas} x {result.cpus} CPUs and {result.memory_mib} MiB, image {result.image}"
    )
    write_json(json_file, result.as_dict())
