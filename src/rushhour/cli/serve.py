"""`rushhour serve`: a run, a plan or a bundle is served by this process, or a model from elsewhere."""

from __future__ import annotations

import contextlib
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
_NETWORK, _ACCESS, _LAYOUT, _LIMITS = "Network", "Access", "CPU layout", "Limits"
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


@click.command("serve", cls=Command, short_help="Serve a run, a plan, a bundle or a model from elsewhere.")
@click.argument("target", type=Place(), metavar="RUN|PLAN|BUNDLE|MODEL")
@option("--model-name", metavar="NAME", help="The model's name in requests. That of the tuned model by default.")
@json_option
@_network_options
@_access_options
@_layout_options
@_limit_options
@_grpc_options
@_stop_options
@_log_options
def command(target: Path, json_file: Path | None, **options: Any) -> None:
    """Serve a run, a plan or a bundle (Open Inference Protocol v2, HTTP and gRPC).

    A MODEL from elsewhere (ONNX and others: `rushhour import --help`) is imported first, for as long as it is served.

    SIGTERM or Ctrl-C answers the requests in flight, then stops; a second signal stops at once. SIGHUP reads API keys
    and certificates again, which also happens when their files change. With --json, the file is written once the server
    answers. More in docs/operations.md.

    \b
    Examples:
      rushhour serve runs/demo
      curl http://127.0.0.1:8000/v2/models/article-fashion-mnist
    """
    from rushhour.serve import open_target, serve

    with _imported(target, options["trust"], options["model_name"]) as path:
        opened = open_target(path)
        settings = settings_of(options)
        policy = opened.plan.policy
        policy = msgspec.structs.replace(
            policy, streams=settings.streams or policy.streams, threads=settings.threads or policy.threads
        )

        def ready(url: str, grpc: str | None, way: str) -> None:
            name = settings.model or opened.name
            where = f"{url} and, over gRPC, at {grpc}" if grpc else url
            click.echo(f"{name} is served at {where}: {way}. Ctrl-C drains and stops.")
            write_json(json_file, {"url": url, "grpc": grpc, "model": name, "policy": policy, "served": way})

        serve(opened, settings, ready)


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
        model=options["model_name"],
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
