"""`rushhour serve`: runs, plans and bundles are served by this process, or a model from elsewhere."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from rushhour.cli.command import Command, option, options
from rushhour.cli.places import Place
from rushhour.cli.quantities import DELAY, PERIOD, SIZE
from rushhour.cli.results import json_option, write_json

if TYPE_CHECKING:
    from rushhour.serve import ServeSettings

_PORT = click.IntRange(0, 65535)
_MODELS, _NETWORK, _ACCESS, _LAYOUT, _LIMITS = "Models", "Network", "Access", "CPU layout", "Limits"
_GRPC, _STOP, _LOGS = "gRPC connections", "Shutdown and supervision", "Logs and traces"

_network_options = options(
    option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", section=_NETWORK,
           help="Address to listen on. Only this machine reaches the default."),
    option("--http-port", default=8000, show_default=True, type=_PORT, metavar="PORT", section=_NETWORK,
           help="Port of HTTP. 0 takes a free one."),
    option("--grpc-port", default=8001, show_default=True, type=_PORT, metavar="PORT", section=_NETWORK,
           help="Port of gRPC. 0 takes a free one."),
    option("--no-grpc", is_flag=True, section=_NETWORK, help="Serve over HTTP only."),
    option("--admin-port", type=_PORT, metavar="PORT", section=_NETWORK,
           help="Take reloads and changes of the log on this port only. 0 takes a free one."),
    option("--admin-host", metavar="ADDRESS", section=_NETWORK,
           help="Address of the admin port. 127.0.0.1 by default."),
)  # fmt: skip

_access_options = options(
    option("--api-key-file", type=Place(), metavar="FILE", section=_ACCESS,
           help="API keys, one a line; clients must send one. Read again when the file changes."),
    option("--tls-cert", type=Place(), metavar="FILE", section=_ACCESS,
           help="Certificate chain (PEM) for TLS, with --tls-key. Read again when it changes."),
    option("--tls-key", type=Place(), metavar="FILE", section=_ACCESS, help="Its private key (PEM)."),
    option("--expose", is_flag=True, section=_ACCESS,
           help="Listen beyond loopback without API keys, because a proxy or firewall controls access."),
    option("--known-as", multiple=True, metavar="NAME", section=_ACCESS,
           help="A further host name of this server, as behind a proxy. Without API keys, changes (reload, log, shared "
           "memory) are accepted under its names only. May be repeated."),
    option("--admin/--no-admin", default=True, show_default=True, section=_ACCESS,
           help="Whether clients may reload the model and change what is logged."),
    option("--shared-memory/--no-shared-memory", default=None, section=_ACCESS,
           help="Whether clients may pass tensors in shared memory of this machine. On loopback by default."),
    option("--trust", multiple=True, metavar="MODULE:FACTORY", section=_ACCESS,
           help="A factory of yours that the torch engine may import, or the path of a model file whose code may run. "
           "May be repeated."),
)  # fmt: skip

_layout_options = options(
    option("--cells", type=click.IntRange(1, 256), metavar="N", section=_LAYOUT,
           help="Server processes that share the ports. The plan's number by default."),
    option("--streams", type=click.IntRange(1, 1024), metavar="N", section=_LAYOUT,
           help="Batches that each cell runs at the same time. The plan's number by default."),
    option("--threads", type=click.IntRange(1, 1024), metavar="N", section=_LAYOUT,
           help="CPU threads of each stream. The plan's number by default, as far as the cores allow."),
    option("--strict", is_flag=True, section=_LAYOUT,
           help="Refuse to serve on a machine that differs from the plan's, instead of scaling the layout to it."),
    option("--fixed", is_flag=True, section=_LAYOUT,
           help="Serve the plan's first variant whatever the load, though the plan has a ladder."),
)  # fmt: skip

_limit_options = options(
    option("--idle-timeout", default="300s", show_default=True, type=PERIOD, metavar="TIME", section=_LIMITS,
           help="Close a connection without requests after this time."),
    option("--request-timeout", default="30s", show_default=True, type=PERIOD, metavar="TIME", section=_LIMITS,
           help="Time in which a request has to arrive completely."),
    option("--max-body", default="64MiB", show_default=True, type=SIZE, metavar="SIZE", section=_LIMITS,
           help="Largest body of a request, decompressed."),
    option("--grpc-max-message", default="16MiB", show_default=True, type=SIZE, metavar="SIZE", section=_LIMITS,
           help="Largest message over gRPC, as received. Copying a message blocks the event loop, so a large bound "
           "delays all other requests."),
)  # fmt: skip

_grpc_options = options(
    option("--grpc-ping-interval", default="500ms", show_default=True, type=DELAY, metavar="TIME", section=_GRPC,
           help="Shortest interval at which clients may send keepalive pings. 0 allows any."),
    option("--grpc-keepalive", type=PERIOD, metavar="TIME", section=_GRPC,
           help="Ping clients that are silent for this time. Off by default."),
    option("--grpc-max-age", type=PERIOD, metavar="TIME", section=_GRPC,
           help="Close a connection after this time, so that the client connects again and load spreads over the "
           "cells. 60s with several cells, off with one."),
    option("--grpc-max-age-grace", type=PERIOD, metavar="TIME", section=_GRPC,
           help="Time that calls in flight have to finish then. No limit by default."),
)  # fmt: skip

_stop_options = options(
    option("--drain-delay", default="0s", show_default=True, type=DELAY, metavar="TIME", section=_STOP,
           help="After SIGTERM, serve for this time while the readiness probe already fails."),
    option("--drain-timeout", default="30s", show_default=True, type=DELAY, metavar="TIME", section=_STOP,
           help="After that, time for requests in flight; longer ones are cut off. A second signal stops at once."),
    option("--frozen-after", default="5s", show_default=True, type=PERIOD, metavar="TIME", section=_STOP,
           help="Replace a cell that does not answer the supervisor for this time."),
)  # fmt: skip

_log_options = options(
    option("--log-format", type=click.Choice(["json", "text"]), section=_LOGS,
           help="Format of the log on standard error. text on a terminal, else json."),
    option("--log-level", default="info", show_default=True, section=_LOGS,
           type=click.Choice(["debug", "info", "warning", "error", "critical"]), help="Least severity that is logged."),
    option("--log-requests", is_flag=True, section=_LOGS, help="Log each request: id, status, times, batch size."),
    option("--server-timing/--no-server-timing", default=True, show_default=True, section=_LOGS,
           help="Whether each answer gives its times (Server-Timing) and its variant."),
    option("--otel", is_flag=True, section=_LOGS,
           help="Send a span for each request to OTEL_EXPORTER_OTLP_ENDPOINT (extra: otel)."),
    option("--otel-sample", type=click.FloatRange(0, 1), metavar="SHARE", section=_LOGS,
           help="Share of requests that are traced. All by default."),
)  # fmt: skip


_models_options = options(
    option("--repository", type=Place(), metavar="DIR", section=_MODELS,
           help="Serve all models of a folder: each folder in it is a run or a bundle, under the folder's name. "
           "Clients load and unload them, and those that are added later."),
    option("--load-model", multiple=True, metavar="NAME", section=_MODELS,
           help="Load only this model of the repository at the start. May be repeated."),
    option("--model-name", multiple=True, metavar="NAME", section=_MODELS,
           help="The model's name in requests; of several models once for each, in their order. That of the tuned "
           "model by default."),
    option("--weight", "weights", multiple=True, metavar="NAME=N", section=_MODELS,
           help="A model's share of the cores, relative to the others', while all have requests. 1 by default. May be "
           "repeated."),
)  # fmt: skip


@click.command("serve", cls=Command, short_help="Serve runs, plans, bundles or a model from elsewhere.")
@click.argument("target", type=Place(), nargs=-1, metavar="[RUN|PLAN|BUNDLE|MODEL]...")
@_models_options
@json_option
@_network_options
@_access_options
@_layout_options
@_limit_options
@_grpc_options
@_stop_options
@_log_options
def command(target: tuple[Path, ...], json_file: Path | None, **options: Any) -> None:
    """Serve a run, a plan or a bundle (Open Inference Protocol v2, HTTP and gRPC), or several behind one port.

    Several models share the cores by weight: none takes from another what that one needs. They are named one by one, or
    are the folders of a --repository.

    A MODEL from elsewhere (ONNX and others: `rushhour import --help`) is imported first, for as long as it is served.

    SIGTERM or Ctrl-C answers the requests in flight, then stops; a second signal stops at once. SIGHUP reads API keys
    and certificates again, which also happens when their files change. With --json, the file is written once the server
    answers. More in docs/operations.md.

    \b
    Examples:
      rushhour serve runs/demo
      curl http://127.0.0.1:8000/v2/models/article-fashion-mnist
      rushhour serve runs/photos runs/texts --weight texts=2
    """
    from rushhour.serve import open_target, serve

    settings, names, weights = settings_of(options), options["model_name"], _weights(options["weights"])
    folder: Path | None = options["repository"]
    if folder is not None or len(target) > 1:
        _serve_several(target, folder, json_file, options, weights)
        return
    if not target:
        raise click.UsageError("name what to serve: a run, a plan, a bundle or a model, or a --repository")
    if weights or options["load_model"]:
        option_name, several = ("--weight", "several models") if weights else ("--load-model", "a --repository")
        raise click.UsageError(f"{option_name} is for {several}")
    if len(names) > 1:
        raise click.UsageError("--model-name is given more than once, and there is one model")
    with _imported(target[0], options["trust"], names[0] if names else None) as path:
        opened = open_target(path)
        settings = msgspec.structs.replace(settings, model=names[0] if names else None)
        policy = opened.plan.policy
        policy = msgspec.structs.replace(
            policy, streams=settings.streams or policy.streams, threads=settings.threads or policy.threads
        )

        def ready(url: str, grpc: str | None, way: str) -> None:
            name = settings.model or opened.name
            click.echo(f"{name} is served at {_where(url, grpc)}: {way}. Ctrl-C drains and stops.")
            write_json(json_file, {"url": url, "grpc": grpc, "model": name, "policy": policy, "served": way})

        serve(opened, settings, ready)


def _serve_several(
    targets: Sequence[Path],
    folder: Path | None,
    json_file: Path | None,
    options: dict[str, Any],
    weights: dict[str, float],
) -> None:
    """Serve several models, or the folders of a repository."""
    from rushhour.serve import Folder, hosted, may_be_model, serve

    if folder is not None and (targets or options["model_name"]):
        other = "models that are named one by one" if targets else "--model-name"
        raise click.UsageError(f"--repository goes without {other}: its folders are the models, under their names")
    if folder is None and options["load_model"]:
        raise click.UsageError("--load-model is for a --repository")
    for each in targets:
        if may_be_model(each):
            raise click.UsageError(f"{each} is neither a run, a plan nor a bundle: `rushhour import` it first")
    if folder is None:
        models = hosted(targets, options["model_name"], weights)
    else:
        models = Folder(folder, weights).all(options["load_model"])
    settings = msgspec.structs.replace(
        settings_of(options), models=models, repository=None if folder is None else str(folder)
    )

    def ready(url: str, grpc: str | None, way: str) -> None:
        lines = way.splitlines()
        count = "1 model is" if len(lines) == 1 else f"{len(lines)} models are"
        click.echo(f"{count} served at {_where(url, grpc)}. Ctrl-C drains and stops.")
        for line in lines:
            click.echo(f"  {line}")
        described = [{"name": model.name, "path": model.path, "weight": model.weight} for model in models]
        write_json(json_file, {"url": url, "grpc": grpc, "models": described, "served": lines})

    serve(models, settings, ready)


def _where(url: str, grpc: str | None) -> str:
    return f"{url} and, over gRPC, at {grpc}" if grpc else url


def _weights(given: Sequence[str]) -> dict[str, float]:
    """Weights by the names of models, from `NAME=N`."""
    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        weight = float(number) if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", number) else 0.0
        if not name or not 0.001 <= weight <= 1000:
            raise click.BadParameter(
                f"{text!r} is not NAME=N with a number N from 0.001 to 1000", param_hint="'--weight'"
            )
        found[name] = weight
    return found


@contextlib.contextmanager
def _imported(target: Path, trust: Sequence[str], name: str | None) -> Iterator[Path]:
    """What to serve: a run, plan or bundle as it is, else the bundle of a model, which another process imports.

    This one would keep the memory of all that imports it: torch.
    """
    from rushhour.serve import may_be_model

    if not may_be_model(target):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="rushhour-", ignore_cleanup_errors=True) as folder:
        bundle = Path(folder) / "bundle"
        words = [*(f"--trust={each}" for each in trust), *([] if name is None else [f"--name={name}"])]
        command = [sys.executable, "-m", "rushhour", "import", str(target), "--out", str(bundle), *words]
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        yield bundle


def settings_of(options: dict[str, Any]) -> ServeSettings:
    """The settings that options name, by the names that click gives them."""
    from rushhour.serve import Limits, ServeSettings

    limits = {
        "idle_s": options["idle_timeout"],
        "request_s": options["request_timeout"],
        "body_bytes": int(options["max_body"]),
        "grpc_bytes": int(options["grpc_max_message"]),
        "ping_s": options["grpc_ping_interval"],
        "keepalive_s": options["grpc_keepalive"],
        "grpc_age_s": options["grpc_max_age"],
        "grpc_grace_s": options["grpc_max_age_grace"],
    }
    files = {name: str(file) if (file := options[name]) else None for name in ("api_key_file", "tls_cert", "tls_key")}
    same = (
        "host", "http_port", "known_as", "admin", "admin_port", "admin_host", "shared_memory", "log_format",
        "log_level", "log_requests", "server_timing", "otel", "otel_sample", "cells", "streams", "threads", "strict",
        "fixed",
    )  # fmt: skip
    return ServeSettings(
        **{name: options[name] for name in same},
        grpc_port=None if options["no_grpc"] else options["grpc_port"],
        trusted=options["trust"],
        limits=msgspec.convert(limits, Limits),
        api_key_file=files["api_key_file"],
        tls_certificate=files["tls_cert"],
        tls_key=files["tls_key"],
        exposed=options["expose"],
        drain_delay_s=options["drain_delay"],
        drain_timeout_s=options["drain_timeout"],
        frozen_s=options["frozen_after"],
        exact=False,
    )
