"""`rushhour deploy`: a run's Plan on Ray Serve; its status, the way back, its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rushhour.cli.command import Command, option, options
from rushhour.cli.places import Place
from rushhour.cli.quantities import DELAY, PERIOD
from rushhour.cli.results import json_option, write_json
from rushhour.cli.terminal import TerminalProgress

if TYPE_CHECKING:
    from rushhour.api import Deployed

_PORT = click.IntRange(1, 65_535)
_HERE = "auto"
_WHERE, _WHAT, _REACHED, _LATER = "Where", "What is deployed", "How it is reached", "Afterwards"

_deploy_options = options(
    option("--ray", is_flag=False, flag_value=_HERE, metavar="[ADDRESS]", section=_WHERE,
           help="A Ray cluster: HOST:PORT of its head, from one of its machines. Without ADDRESS the Ray that runs on "
           "this machine; where none does, one is started on loopback."),
    option("--name", metavar="NAME", section=_WHAT,
           help="Of the deployment: a DNS label. From the model's name by default. What is deployed under it is "
           "updated."),
    option("--replicas", default="1", show_default=True, metavar="N|N..M", section=_WHAT,
           help="How many; 2..8 is as many as goodput and waits need."),
    option("--scale-down-after", default="60s", show_default=True, type=PERIOD, metavar="TIME", section=_WHAT,
           help="End a replica after so long a time of low load."),
    option("--timeout", default="3m", show_default=True, type=PERIOD, metavar="TIME", section=_WHAT,
           help="In which the replicas are to be ready. Else what was deployed before stays."),
)  # fmt: skip

_reached_options = options(
    option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", section=_REACHED,
           help="Address that replicas and Ray's proxies listen on. Only the same machine reaches the default."),
    option("--expose", is_flag=True, section=_REACHED,
           help="Listen beyond loopback, because a proxy or firewall controls access."),
    option("--ports", metavar="FIRST-LAST", section=_REACHED,
           help="Ports of replicas on each node. Any free ones by default."),
    option("--grpc/--no-grpc", default=True, show_default=True, section=_REACHED,
           help="Whether replicas serve over gRPC too."),
    option("--drain-delay", default="5s", show_default=True, type=DELAY, metavar="TIME", section=_REACHED,
           help="A replica that is to end still takes requests for this time, while clients learn that it ends."),
    option("--route", default="/", show_default=True, metavar="PATH", section=_REACHED,
           help="Path of this deployment behind Ray's proxy."),
    option("--proxy-port", default=8000, show_default=True, type=_PORT, metavar="PORT", section=_REACHED,
           help="Port of Ray's HTTP proxy, where Ray Serve does not run yet."),
    option("--proxy-grpc-port", type=_PORT, metavar="PORT", section=_REACHED,
           help="Port of Ray's gRPC proxy, likewise. No such proxy by default."),
)  # fmt: skip

_later_options = options(
    option("--status", metavar="NAME", section=_LATER,
           help="How the deployment is: replicas, their addresses, the plan."),
    option("--undo", metavar="NAME", section=_LATER, help="Go back to the plan before, without a lost request."),
    option("--delete", metavar="NAME", section=_LATER,
           help="End the deployment. A Ray that was started for it ends with the last one."),
)  # fmt: skip


@click.command("deploy", cls=Command, short_help="Serve a run on a Ray cluster.")
@click.argument("run", type=Place(), metavar="[RUN|PLAN]", required=False)
@json_option
@_deploy_options
@_reached_options
@_later_options
@click.pass_context
def command(context: click.Context, /, run: Path | None, json_file: Path | None, **options: Any) -> None:
    """Deploy the Plan of RUN on Ray Serve, or update what is deployed under this name.

    Each replica owns a whole `rushhour serve` process on its node, with the CPUs that the Plan needs. Clients reach it
    directly: that costs nothing. Ray's proxy has one address for all replicas, and costs most of a small model's
    throughput. An update starts a replica with the new Plan before it ends one with the old, and loses no request. More
    in docs/deployment.md.

    \b
    Examples:
      rushhour deploy runs/photos --ray --replicas 2
      rushhour deploy runs/photos --ray 10.0.0.5:6379 --replicas 2..8 --host 0.0.0.0 --expose

    \b
      rushhour deploy --status photos
      rushhour deploy --undo photos
      rushhour deploy --delete photos
    """
    asked = {verb: name for verb in ("status", "undo", "delete") if (name := options.pop(verb)) is not None}
    _check(context, run, asked)
    ray = options.pop("ray")
    address = None if ray == _HERE else ray
    if asked:
        ((verb, name),) = asked.items()
        _later(verb, name, address, options["timeout"], json_file)
        return
    from rushhour.api import deploy

    assert run is not None
    with TerminalProgress() as progress:
        found = deploy(run, ray=address, progress=progress, **options)
    _show(found, json_file)


def _check(context: click.Context, run: Path | None, asked: dict[str, str]) -> None:
    """Raise unless exactly one thing is asked for, with the options that it has."""
    if len(asked) + (run is not None) != 1:
        raise click.UsageError(
            "give either RUN to deploy, or one of --status, --undo and --delete with a NAME", context
        )
    given = [
        param.opts[0]
        for param in context.command.params
        if param.name not in ("run", "ray", "json_file", "timeout", *asked)
        and context.get_parameter_source(param.name or "") == click.core.ParameterSource.COMMANDLINE
    ]
    if asked and given:
        raise click.UsageError(f"{given[0]} has no effect with --{next(iter(asked))}: omit it", context)
    if run is not None and context.params["ray"] is None:
        raise click.UsageError("say where: --ray for the Ray of this machine, or --ray HOST:PORT", context)


def _later(verb: str, name: str, address: str | None, timeout_s: float, json_file: Path | None) -> None:
    from rushhour.api import deployed

    found = deployed(name, ray=address)
    if verb == "delete":
        found.delete()
        click.echo(f"{name} is deleted")
        write_json(json_file, {"name": name, "state": "deleted"})
        return
    if verb == "undo":
        with TerminalProgress() as progress:
            found = found.undo(timeout=timeout_s, progress=progress)
    _show(found, json_file)


def _show(found: Deployed, json_file: Path | None) -> None:
    """One line for the deployment, one for each replica, one for each proxy."""
    facts = found.as_dict()
    scale = f"{facts['least']}" if facts["least"] == facts["most"] else f"{facts['least']}..{facts['most']}"
    before = f", before {facts['previous'][:12]}" if facts["previous"] else ""
    click.echo(f"{found.name}: {found.state}, plan {found.plan[:12]}{before}, replicas {scale} x {facts['cpus']} CPUs")
    for each in found.replicas:
        grpc = f"  grpc://{each.grpc}" if each.grpc else ""
        cores = f"  cores {','.join(map(str, each.cores))}" if each.cores else ""
        click.echo(f"  {each.state:<9} {each.http}{grpc}  plan {each.plan[:12]}{cores}")
    if found.proxy:
        grpc = f"  grpc://{facts['proxy_grpc']} with application: {found.name}" if facts["proxy_grpc"] else ""
        click.echo(f"  proxy     {found.proxy}{grpc}")
    if facts["message"]:
        click.echo(f"  {facts['message']}")
    write_json(json_file, facts)
