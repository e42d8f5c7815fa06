"""The command line. Every command: --json FILE for machines, progress for people, exit 0 only on success.

Exit codes: 0 success; 1 an honest "no" (an SLO that does not hold, nothing inside the budget); 2 an error, in one
line that says what, why and what to do; 130 interrupted.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
import msgspec

from rushhour.cli.compressing import compress_options
from rushhour.cli.places import Named, Place, advised, try_places
from rushhour.cli.terminal import TerminalProgress, result_console
from rushhour.cli.training import (
    basic_options,
    data_options,
    fitted,
    load_data,
    model_of,
    name_given,
    place_options,
    settings_of,
    train_options,
)
from rushhour.errors import GoalError, PlanError, RushhourError, StorageError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.system.faults import unforeseen
from rushhour.system.interruption import INTERRUPTION
from rushhour.system.machine import open_files
from rushhour.system.storage import check_claim, check_own_file, home, try_building, try_file, try_folder, write_whole

if TYPE_CHECKING:
    from rushhour.cli.loading import Sending
    from rushhour.data import Kind
    from rushhour.serve.observability.log import LogFormat
    from rushhour.serve.processes.messages import LogLevel

    _Float = click.ParamType[float]
else:
    _Float = click.ParamType  # older versions cannot be subscripted

# Only what every command needs is imported here: `rushhour serve` must not pay for what `rushhour train` uses.

C = TypeVar("C", bound=Callable[..., Any])

_MADE_BY, _US = "made_by", "rushhour"
"""In every result: what bears it may be replaced by another."""
_DEMO = "article-fashion-mnist"
"""The demo's model, under which README and docs ask for it."""
_FILES, _FEWEST_FILES = 4096, 32
"""That a command may open: enough for anything, and the least that any can work with."""


class _Quantity(_Float):
    """A number with a unit, such as 10s or 64MiB; without one it is in the first unit.

    Args:
        name: of what it measures.
        units: each in terms of the first.
        least: the smallest allowed.
        most: the largest.
    """

    def __init__(self, name: str, units: dict[str, float], least: float, most: float) -> None:
        self.name = name
        self._units = units
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The value in the first unit."""
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?([A-Za-z]*)", str(value).strip())
        first, unit = next(iter(self._units)), found and found[2]
        if not found or (unit and unit not in self._units):
            self.fail(f"{value!r} is not a number with one of the units {', '.join(self._units)}", param, ctx)
        size = float(found[1]) * self._units[unit or first]
        if not self._least <= size <= self._most:
            self.fail(f"{value!r} is not between {self._least:g}{first} and {self._most:g}{first}", param, ctx)
        return size


_UNITS = {"s": 1.0, "ms": 1e-3, "m": 60.0, "h": 3600.0}
_PERIOD = _Quantity("time", _UNITS, 1e-3, 86_400)
_DELAY = _Quantity("time", _UNITS, 0, 86_400)
_SIZE = _Quantity(
    "size", {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1e3, "MB": 1e6, "GB": 1e9}, 1, 2**31 - 1
)


def _slo(command: C) -> C:
    return click.option(
        "--slo", default="p99<50ms", show_default=True, help="The latency limit. Quote it: the shell reads '<'."
    )(command)


def _drop(command: C) -> C:
    return click.option(
        "--max-accuracy-drop",
        default="1%",
        show_default=True,
        help="The accuracy budget in percentage points: with 1%, 90% may become 89%.",
    )(command)


def _data(command: C) -> C:
    return click.option(
        "--data",
        required=True,
        type=Named(),
        metavar="DATA",
        help="fashion-mnist, a folder with one folder per class, a .npz file, or module:factory.",
    )(command)


def _json(command: C) -> C:
    return click.option(
        "--json",
        "json_file",
        type=Place(try_file),
        metavar="FILE",
        callback=_check_json,
        help="Write the result as JSON.",
    )(command)


def _check_json(ctx: click.Context, param: click.Parameter, file: Path | None) -> Path | None:
    """Before any work: whether that file may be written."""
    if file is not None:
        check_own_file(file, _is_result)
    return file


def _is_result(content: bytes) -> bool:
    try:
        return msgspec.json.decode(content, type=dict[str, Any]).get(_MADE_BY) == _US
    except (msgspec.DecodeError, RecursionError):
        return False


def _placed(command: C) -> C:
    for option in place_options():
        command = option(command)
    return command


class _Stopped(click.ClickException):
    """A signal has ended the command; the message says how to go on."""


class _Command(click.Command):
    """A command whose places are tried before it begins, and that says how to go on when a signal ends it.

    Args:
        go_on: in words; is given its parameters.
    """

    def __init__(self, *given: Any, go_on: Callable[[dict[str, Any]], str] | None = None, **named: Any) -> None:
        super().__init__(*given, **named)
        self._go_on = go_on

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        try:
            _check_files()
            try_places(ctx)
            if "out" not in ctx.params:
                return super().invoke(ctx)
            with advised("--out"):
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped("run it again" if self._go_on is None else self._go_on(ctx.params)) from stop
        except (EOFError, BrokenPipeError) as error:  # click takes them for the end of the terminal, and says nothing
            renamed = RuntimeError(str(error) or type(error).__name__)
            for note in getattr(error, "__notes__", ()):
                renamed.add_note(note)
            raise renamed from error


def _check_files() -> None:
    """Raise unless this process may open as many files as any command needs; the limit is raised as far as may be."""
    files, used = open_files(_FILES)
    if files - used < _FEWEST_FILES:
        raise StorageError(
            f"this process may open only {files} files",
            f"{used} are open, and any command needs {_FEWEST_FILES} more",
            "raise the limit: ulimit -n 4096",
        )


def _tune_goes_on(params: dict[str, Any]) -> str:
    from rushhour.plan import SO_FAR

    out: Path = params["out"]
    best = f"; the best way so far: rushhour serve {out}" if (out / SO_FAR).is_file() else ""
    return f"the same command goes on where it was{best}"


def _load_goes_on(_: dict[str, Any]) -> str:
    return "what was measured until then is shown; run it again for the rest"


class _Group(click.Group):
    command_class = _Command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rushhour")
def cli() -> None:
    """Find, prove and run the fastest way to serve a deep-learning model to a crowd.

    \b
    First time here?
        rushhour demo                                   everything, on real data, in a few minutes
    Your own model:
        rushhour tune article --data photos/ --slo 'p99<50ms' --max-accuracy-drop 1% --out runs/photos
        rushhour serve runs/photos
        rushhour load http://127.0.0.1:8000 --slo 'p99<50ms'
    """


@cli.command(go_on=_tune_goes_on)
@click.option("--out", default="runs/demo", show_default=True, type=Place(try_folder), help="The run's folder.")
@_slo
@_drop
@click.option("--budget", default="5m", show_default=True, help="How long it may take, about. Training gets its share.")
@click.option("--force", is_flag=True, help="Replace the plan of a run there that was asked otherwise.")
@_json
def demo(out: Path, slo: str, max_accuracy_drop: str, budget: str, force: bool, json_file: Path | None) -> None:
    """The whole path on real data: train, compress, serve, load, and return the Plan.

    Trains the reference network (VGG style, 28x28) on Fashion-MNIST, quantises it, tries every way to serve it, and
    ends with reference and winner side by side. Killed? Run it again: it goes on where it was.
    """
    goal = Goal(slo=SLO.parse(slo), budget=AccuracyBudget.parse(max_accuracy_drop))
    training = {"epochs": 3, "lr": 2e-3, "batch": 128, "seed": 0}
    _tune(
        "article",
        "fashion-mnist",
        goal,
        out,
        training,
        json_file,
        budget_s=_seconds(budget),
        fit_epochs=True,
        name=_DEMO,
        force=force,
    )


@cli.command(go_on=_tune_goes_on)
@click.argument("model", type=Named())
@_data
@data_options
@_slo
@_drop
@click.option("--out", required=True, type=Place(try_folder), metavar="RUN", help="The run's folder.")
@click.option(
    "--budget",
    metavar="TIME",
    help="How long it may take, about: 8m. What decides least is left out, and fewer epochs are trained than the usual "
    "ones where this machine is slow. Without it, it takes as long as it takes.",
)
@_placed
@click.option(
    "--trust", multiple=True, metavar="MODULE:FACTORY", help="A factory of yours that a bundle names and may import."
)
@basic_options
@_json
def tune(
    model: str,
    data: str,
    slo: str,
    max_accuracy_drop: str,
    out: Path,
    budget: str | None,
    name: str | None,
    force: bool,
    trust: tuple[str, ...],
    json_file: Path | None,
    size: str | None,
    skip_corrupt: bool,
    kind: Kind | None,
    **training: Any,
) -> None:
    """Find the way to serve MODEL that carries the most requests per second inside both limits.

    MODEL is a bundle, the name of a reference network (article, residual, mlp) or your own module:factory, which is
    trained first. The answer is RUN/plan.json, the proof RUN/measurements.jsonl and RUN/report.html.

    \b
    rushhour tune runs/demo/bundles/reference --data fashion-mnist --slo 'p99<20ms' --out runs/strict
    rushhour tune article --data photos/ --budget 8m --out runs/quick
    """
    goal = Goal(slo=SLO.parse(slo), budget=AccuracyBudget.parse(max_accuracy_drop))
    is_asked = click.get_current_context().get_parameter_source("epochs") is click.core.ParameterSource.COMMANDLINE
    budget_s = None if budget is None else _seconds(budget)
    reading = {"size": size, "skip_corrupt": skip_corrupt, "kind": kind}
    _tune(
        model,
        data,
        goal,
        out,
        training,
        json_file,
        budget_s=budget_s,
        fit_epochs=not is_asked,
        name=name_given(name),
        force=force,
        reading=reading,
        trust=trust,
    )


def _tune(
    model: str,
    data: str,
    goal: Goal,
    out: Path,
    training: dict[str, Any],
    json_file: Path | None,
    *,
    budget_s: float | None,
    fit_epochs: bool,
    name: str | None,
    force: bool,
    reading: dict[str, Any] | None = None,
    trust: tuple[str, ...] = (),
) -> None:
    from rushhour.bundle import Source
    from rushhour.report import SummaryTable, write_report
    from rushhour.tune import TuneSettings, tune_run

    console = result_console()
    check_claim(out)  # before data is loaded, as what is wrong with the settings
    settings_of(training)
    with TerminalProgress() as progress:
        dataset = load_data(data, progress, model, **(reading or {}))
        source, trusted = model_of(model, dataset)
        if isinstance(source, Source):
            training = fitted(training, len(dataset.train))
        plan = tune_run(
            source,
            dataset,
            goal,
            run=out,
            training=settings_of(training),
            settings=TuneSettings(budget_s=budget_s),
            progress=progress,
            trusted=(*trusted, *trust),
            fit_epochs=fit_epochs,
            name=name,
            force=force,
        )
        progress.start("Writing the report")
        report = write_report(out)
        progress.done(str(report))
    _write_json(json_file, plan)
    console.print()
    console.print(SummaryTable(plan))
    console.print(f"\nServe it:  [bold]rushhour serve {out}[/]\nThe proof: {report}", highlight=False)
    if not plan.feasible:
        click.echo("nothing met the whole goal: this is the nearest miss", err=True)
        sys.exit(1)


@cli.command(go_on=lambda _: "the same command goes on at its last checkpoint")
@click.argument("model", type=Named())
@_data
@click.option("--out", required=True, type=Place(try_building), metavar="BUNDLE", help="The bundle's folder.")
@data_options
@basic_options
@train_options
@_json
def train(model: str, data: str, out: Path, json_file: Path | None, **options: Any) -> None:
    """Train MODEL and leave a bundle: ONNX, safetensors and JSON, which open without Rushhour too.

    MODEL is article, residual, mlp, or your own module:factory (a callable that returns a torch.nn.Module).
    Killed? Run it again: it goes on at its last checkpoint, and ends with the same weights. With --workers the network
    is shared out by a plan, which is shown with what the others would have cost; it learns what one worker would.

    \b
    rushhour train article --data photos/ --size 224x224 --augment flip,crop --epochs 20 --out runs/photos
    rushhour train mynet:build --data photos/ --optimizer adamw --weight-decay 0.01 --patience 5 --out runs/mine
    rushhour train article --data photos/ --workers 4 --out runs/photos
    rushhour train article --data photos/ --workers 8 --parallel pipeline --memory 2 --out runs/photos
    torchrun --nnodes 2 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m rushhour train ...
    rushhour train article --data photos/ --search 20 --epochs 10 --out runs/best
    rushhour report runs/photos-training
    """
    from rushhour.cli import training

    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # on one worker, a signal ends this very process: say at least where
    with training.progress_of_training() as progress:
        outcome = training.run(model, data, out, progress, **options)
    bundle = outcome.bundle
    _write_json(json_file, training.result(outcome))
    if outcome.found is not None:
        training.print_found(result_console(), outcome.found)
    click.echo(f"{bundle.path}: {bundle.manifest.parameters:,} parameters, {_size(bundle.model_bytes)}")


@cli.command(go_on=lambda _: "the same command goes on, and computes nothing twice")
@click.argument("bundle", type=Place())
@_data
@data_options
@_drop
@click.option("--out", required=True, type=Place(try_building), metavar="DIR", help="The new bundle's folder.")
@compress_options
@_json
def compress(
    bundle: Path, data: str, max_accuracy_drop: str, out: Path, json_file: Path | None, **options: Any
) -> None:
    """Make BUNDLE smaller and faster within an accuracy budget, judged on the compiled artefact of every step.

    A recipe is a list of steps: prune (channels), lowrank (dense layers), distil (learn from BUNDLE's answers), then
    int8, bf16, f16 or w8. DIR is the best: inside the budget, and never slower than what it was made from. Killed? Run
    it again: nothing is computed twice.

    \b
    rushhour compress runs/photos --data photos/ --max-accuracy-drop 1% --out runs/small
    rushhour compress runs/photos --data photos/ --recipe prune:0.5,lowrank:0.1,distil:10,int8 --out runs/small
    rushhour compress runs/photos --data photos/ --recipe prune:0.3:ignored=0+2:epochs=3,int8 --out runs/small
    """
    from rushhour.cli import compressing

    budget = AccuracyBudget.parse(max_accuracy_drop)
    with TerminalProgress() as progress:
        found, report = compressing.run(bundle, data, budget, out, progress, **options)
    _write_json(json_file, compressing.result(found, out, report))
    compressing.print_compression(result_console(), found)
    click.echo(f"{out}; what each step cost and bought: {report}")
    if found.verdict != "best":
        click.echo(f"{found.verdict}: {found.said}", err=True)
        sys.exit(1)


@cli.command()
@click.argument("target", type=Place(), metavar="RUN|PLAN|BUNDLE")
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback by default: exposing is a decision.")
@click.option("--http-port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--grpc-port", default=8001, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--no-grpc", is_flag=True, help="Serve over HTTP only.")
@click.option("--model-name", default=None, help="The model's name on the wire; that of the tuned model by default.")
@click.option("--api-key-file", type=Place(), help="Keys that clients must send, one a line.")
@click.option("--tls-cert", type=Place(), help="Certificate chain (PEM); with --tls-key.")
@click.option("--tls-key", type=Place(), help="Its private key (PEM).")
@click.option("--expose", is_flag=True, help="Listen beyond loopback without keys: something else keeps the door.")
@click.option(
    "--known-as",
    multiple=True,
    metavar="NAME",
    help="Another name of the server, as behind a proxy: without keys, changes are taken under its names only.",
)
@click.option("--cells", type=click.IntRange(1, 256), help="Processes behind the port; the plan's number by default.")
@click.option("--streams", type=click.IntRange(1, 1024), help="Batches that each cell runs at the same time.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="CPU threads of each stream; as the plan says, as far as they fit."
)
@click.option(
    "--idle-timeout", default="300s", show_default=True, type=_PERIOD, help="A connection without requests is closed."
)
@click.option("--request-timeout", default="30s", show_default=True, type=_PERIOD, help="For a request to be whole.")
@click.option("--max-body", default="64MiB", show_default=True, type=_SIZE, help="Of a request, unpacked.")
@click.option(
    "--grpc-max-message",
    default="16MiB",
    show_default=True,
    type=_SIZE,
    help="Over gRPC as it comes, if that is less; a larger one stops everybody for as long as it takes to copy it.",
)
@click.option(
    "--drain-delay",
    default="0s",
    show_default=True,
    type=_DELAY,
    help="At SIGTERM: go on serving for so long, while readiness already says no.",
)
@click.option(
    "--drain-timeout",
    default="30s",
    show_default=True,
    type=_DELAY,
    help="After that: for requests under way; what takes longer is cut off. A second signal ends at once.",
)
@click.option(
    "--frozen-after", default="5s", show_default=True, type=_PERIOD, help="A cell that is silent so long is replaced."
)
@click.option(
    "--grpc-ping-interval",
    default="500ms",
    show_default=True,
    type=_DELAY,
    help="The shortest at which gRPC clients may ping (keepalive); 0 lets them as they like.",
)
@click.option("--grpc-keepalive", type=_PERIOD, help="Ping gRPC clients that are silent so long; never by default.")
@click.option(
    "--grpc-max-age",
    type=_PERIOD,
    help="Have gRPC clients connect anew after so long, to another cell perhaps; 60s with several cells, else never.",
)
@click.option("--grpc-max-age-grace", type=_PERIOD, help="For calls under way then; as long as they take by default.")
@click.option("--admin/--no-admin", default=True, show_default=True, help="Whether clients may reload the model.")
@click.option(
    "--admin-port", type=click.IntRange(0, 65535), help="Where they may, and nowhere else; 0 takes a free one."
)
@click.option("--admin-host", default=None, help="Where that listens; 127.0.0.1 by default.")
@click.option(
    "--shared-memory/--no-shared-memory",
    default=None,
    help="Whether clients may have shared memory of this machine read and written; on loopback by default.",
)
@click.option("--log-format", type=click.Choice(["json", "text"]), help="Text on a terminal by default, else JSON.")
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(["debug", "info", "warning", "error", "critical"]),
    help="Log what is at least so serious, to standard error.",
)
@click.option("--log-requests", is_flag=True, help="Log each request: its id, status, times, batch.")
@click.option("--otel", is_flag=True, help="Send spans of requests to OTEL_EXPORTER_OTLP_ENDPOINT (extra: otel).")
@click.option(
    "--otel-sample", type=click.FloatRange(0, 1), help="The share of requests that is traced; all by default."
)
@click.option(
    "--trust", multiple=True, metavar="MODULE:FACTORY", help="A factory of yours that the torch engine may import."
)
@_json
def serve(
    target: Path,
    host: str,
    http_port: int,
    grpc_port: int,
    no_grpc: bool,
    model_name: str | None,
    api_key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    expose: bool,
    known_as: tuple[str, ...],
    cells: int | None,
    streams: int | None,
    threads: int | None,
    idle_timeout: float,
    request_timeout: float,
    max_body: float,
    grpc_max_message: float,
    drain_delay: float,
    drain_timeout: float,
    frozen_after: float,
    grpc_ping_interval: float,
    grpc_keepalive: float | None,
    grpc_max_age: float | None,
    grpc_max_age_grace: float | None,
    admin: bool,
    admin_port: int | None,
    admin_host: str | None,
    shared_memory: bool | None,
    log_format: LogFormat | None,
    log_level: LogLevel,
    log_requests: bool,
    otel: bool,
    otel_sample: float | None,
    trust: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Answer requests as a Plan says (Open Inference Protocol v2, HTTP and gRPC).

    SIGTERM or Ctrl-C drains, a second one ends at once. SIGHUP reads keys and certificates again, which also happens
    when their files change. More in docs/operating.md.

    \b
    rushhour serve runs/demo
    curl http://127.0.0.1:8000/v2/models/article-fashion-mnist
    """
    from rushhour.serve import Limits, ServeSettings, open_target
    from rushhour.serve import serve as serve_target

    opened = open_target(target)
    policy = msgspec.structs.replace(
        opened.plan.policy,
        streams=streams or opened.plan.policy.streams,
        threads=threads or opened.plan.policy.threads,
    )
    limits = {
        "idle_s": idle_timeout,
        "request_s": request_timeout,
        "body_bytes": int(max_body),
        "grpc_bytes": int(grpc_max_message),
        "ping_s": grpc_ping_interval,
        "keepalive_s": grpc_keepalive,
        "grpc_age_s": grpc_max_age,
        "grpc_grace_s": grpc_max_age_grace,
    }

    def ready(url: str, grpc: str | None, way: str) -> None:
        name = model_name or opened.name
        where = f"{url} and, over gRPC, at {grpc}" if grpc else url
        click.echo(f"{name} is served at {where}: {way}. Ctrl-C drains and stops.")
        _write_json(json_file, {"url": url, "grpc": grpc, "model": name, "policy": policy, "served": way})

    settings = ServeSettings(
        host=host,
        http_port=http_port,
        grpc_port=None if no_grpc else grpc_port,
        model=model_name,
        trusted=trust,
        limits=msgspec.convert(limits, Limits),
        api_key_file=str(api_key_file) if api_key_file else None,
        tls_certificate=str(tls_cert) if tls_cert else None,
        tls_key=str(tls_key) if tls_key else None,
        exposed=expose,
        known_as=known_as,
        admin=admin,
        admin_port=admin_port,
        admin_host=admin_host,
        shared_memory=shared_memory,
        log_format=log_format,
        log_level=log_level,
        log_requests=log_requests,
        otel=otel,
        otel_sample=otel_sample,
        cells=cells,
        streams=streams,
        threads=threads,
        drain_delay_s=drain_delay,
        drain_timeout_s=drain_timeout,
        frozen_s=frozen_after,
        exact=False,
    )
    serve_target(opened, settings, ready)


def _sending(command: C) -> C:
    for option in (
        click.option("--check", is_flag=True, help="Compare each answer with the first one to the same request."),
        click.option("--header", multiple=True, metavar="'K: V'", help="Send this too. For any HTTP endpoint."),
        click.option("--path", default=None, help="Send there. For any HTTP endpoint."),
        click.option("--method", default=None, help="POST, GET, ... For any HTTP endpoint."),
        click.option("--body", type=Place(), help="Send this file, to any HTTP endpoint."),
        click.option(
            "--payloads",
            type=Place(),
            metavar="DIR",
            help="Send the samples of a bundle, or a folder's .npy, .npz, .json, .bin, .jpg, .png and .txt files.",
        ),
        click.option(
            "--shape",
            "shapes",
            multiple=True,
            metavar="NAME:3,224,224",
            help="The shape of an input where the server's metadata leaves sizes open: of one sample, or of all the "
            "tensor where it has as many axes. NAME:FP32:3,224,224 says the type, too.",
        ),
        click.option("--json-tensors", is_flag=True, help="Send tensors as JSON numbers, not as raw bytes."),
        click.option(
            "--seed", default=None, type=click.IntRange(0, 2**53), help="Of the arrivals; a fresh one by default."
        ),
        click.option(
            "--rows",
            default=1,
            show_default=True,
            type=click.IntRange(1, 65_536),
            help="Samples in one request, for a model that takes several.",
        ),
        click.option("--model", default=None, help="The model's name; not needed where the server has only one."),
        click.option(
            "--arrivals",
            default="poisson",
            show_default=True,
            type=Named(),
            metavar="PROCESS",
            help="poisson, constant, bursty (bursty:intensity=5,share=0.1,burst_s=0.5), or a file of recorded times.",
        ),
    ):
        command = option(command)
    return command


def _read_sending(
    arrivals: str,
    seed: int | None,
    json_tensors: bool,
    header: tuple[str, ...],
    shapes: tuple[str, ...],
    **rest: Any,
) -> Sending:
    import secrets

    from rushhour.cli.loading import Sending
    from rushhour.load import read_arrivals, read_shapes

    return Sending(
        arrivals=read_arrivals(arrivals),
        seed=secrets.randbelow(2**31) if seed is None else seed,
        encoding="json" if json_tensors else "binary",
        headers=header,
        shapes=read_shapes(shapes),
        **rest,
    )


def _read_rates(texts: tuple[str, ...], sending: Sending) -> list[float]:
    """Requests per second; `recorded` is the rate of a trace as it was."""
    from rushhour.load import Trace

    rates = []
    for text in texts:
        if text == "recorded":
            if not isinstance(sending.arrivals, Trace):
                raise GoalError(
                    "there is no recorded rate", "the arrivals are not a trace", "use for example --rate 100"
                )
            rates.append(sending.arrivals.rate_rps)
            continue
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise GoalError(
                f"cannot send {text!r} requests per second",
                "a rate is a number above zero",
                "use for example --rate 100",
            )
        rates.append(rate)
    return rates


@cli.command(go_on=_load_goes_on)
@click.argument("url")
@_slo
@click.option(
    "--rate",
    "rates",
    multiple=True,
    help="Requests per second: a window and a verdict for each; `recorded` for a trace's own.",
)
@click.option(
    "--duration",
    default=None,
    help="Length of a window, such as 10s or 2m; longer where the SLO needs more requests. 10s by default, a trace "
    "with --rate all of it.",
)
@click.option("--closed-loop", type=int, metavar="N", help="N users that wait for their answers; no verdict.")
@_sending
@click.option("--plot", type=Place(try_file), metavar="FILE", help="Draw latency against rate: a .png or .html file.")
@_json
def load(
    url: str,
    slo: str,
    rates: tuple[str, ...],
    duration: str | None,
    closed_loop: int | None,
    plot: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Does the server at URL keep the SLO? With --rate: at that rate. Without: up to which rate?

    Open loop: requests come when they come, whether or not earlier ones are answered, and latency counts from the
    scheduled arrival. Exit code 0 only if the SLO holds; Ctrl-C keeps what was measured. URL is http://HOST:PORT or
    grpc://HOST:PORT of an Open Inference Protocol server; with --body, --path or --method any HTTP endpoint.

    \b
    rushhour load http://127.0.0.1:8000 --slo 'p99<50ms' --rate 500 --duration 10s
    rushhour load http://127.0.0.1:8000 --slo 'p99<50ms' --plot load.html
    rushhour load http://127.0.0.1:8000 --arrivals trace.csv --rate 500
    rushhour load http://127.0.0.1:8080 --path /predict --body cat.jpg --header 'Accept: */*' --rate 50
    """
    from rushhour.cli.loading import load as load_server
    from rushhour.cli.loading import load_closed, print_closed, print_windows
    from rushhour.load import Trace

    limit = SLO.parse(slo)
    seconds = _seconds(duration) if duration is not None else 10.0
    sending = _read_sending(**options)
    asked = _read_rates(rates, sending)
    if plot is not None:
        from rushhour.report.load import check_plot_name

        check_plot_name(plot)
    console = result_console()
    if closed_loop is not None:
        if asked or plot is not None:
            raise GoalError(
                "cannot load in a closed loop so", "it has no rate and no plot of it", "leave out --rate and --plot"
            )
        result, stopped = load_closed(url, sending, concurrency=closed_loop, duration_s=seconds)
        print_closed(console, result)
        _write_json(json_file, {"loop": "closed", "url": url, "partial": stopped, "result": result})
        if stopped:
            raise KeyboardInterrupt
        if result.errors or not result.throughput_rps:
            sys.exit(1)
        return
    whole = len(sending.arrivals.gaps) if isinstance(sending.arrivals, Trace) and duration is None else None
    if duration is not None and not asked:
        what = "without --rate, --duration says nothing: the search for the capacity takes a minute or two"
        click.echo(what, err=True)
    loaded = load_server(url, limit, sending, rates=asked, window_s=seconds, n=whole if asked else None)
    print_windows(console, limit, loaded.windows)
    console.print(loaded.headline, style="bold", highlight=False, markup=False)
    _write_json(json_file, loaded.result)
    if plot is not None and any(window.p99_ms is not None for window in loaded.windows):
        from rushhour.report import write_load_plot

        write_load_plot(plot, loaded.result["model"] or url, loaded.windows, limit, loaded.headline)
        click.echo(plot)
    elif plot is not None:
        click.echo(f"no window has a p99, so {plot} is not drawn", err=True)
    if loaded.error is not None:
        raise loaded.error
    if loaded.stopped:
        raise KeyboardInterrupt
    if not loaded.holds:
        sys.exit(1)


@cli.command(go_on=_load_goes_on)
@click.argument("urls", nargs=-1, required=True, metavar="URL URL...")
@_slo
@click.option("--rate", "rates", multiple=True, required=True, help="Requests per second; may be given repeatedly.")
@click.option("--window", default="5s", show_default=True, help="Length of one window; longer where the SLO needs it.")
@click.option(
    "--blocks",
    default=6,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="Windows of each server at each rate.",
)
@_sending
@_json
def compare(
    urls: tuple[str, ...],
    slo: str,
    rates: tuple[str, ...],
    window: str,
    blocks: int,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Which server is faster at the same rate, and how sure is that?

    Windows of all servers are interleaved (A B, B A, ...) on the same arrivals; each block gives ratios of p50, p99
    and answers per second to the first server's, with a 95% interval. Exit code 0 if every block could be counted.

    \b
    rushhour compare http://127.0.0.1:8000 http://127.0.0.1:9000 --rate 200 --rate 400
    """
    from rushhour.cli.loading import STOPPED, arrivals_name, contest, print_comparison

    limit, sending = SLO.parse(slo), _read_sending(**options)
    asked = _read_rates(rates, sending)
    found, stopped = contest(urls, limit, sending, rates=asked, window_s=_seconds(window), blocks=blocks)
    console = result_console()
    print_comparison(console, found)
    if stopped:
        console.print(f"partial: {stopped}", style="bold", highlight=False, markup=False)
    facts = {"arrivals": arrivals_name(sending.arrivals), "seed": sending.seed, "partial": bool(stopped)}
    _write_json(json_file, msgspec.to_builtins(found) | facts | {"slo": str(limit)})
    if stopped.startswith(STOPPED):
        raise KeyboardInterrupt
    if stopped:
        sys.exit(2)
    if any(ratio.interval is None for ratio in found.ratios):
        sys.exit(1)


_OF_A_RUN = ("plan.json", "plan-so-far.json", "measurements.jsonl", "curves.jsonl", "compression.json", "report.html")


@cli.command()
@click.argument("run", type=Place())
@click.option("--out", type=Place(try_file), metavar="FILE", help="Write it there; RUN/report.html by default.")
@_json
def report(run: Path, out: Path | None, json_file: Path | None) -> None:
    """Write RUN/report.html anew: one file, offline, from RUN's plan and measurements.

    RUN may also be a bundle that was trained or compressed, or the folder beside it (BUNDLE-training, BUNDLE-steps):
    the report then draws the curves of the training, or shows what each step of the compression cost and bought. A file
    in the folder, such as RUN/plan.json, names it too.
    """
    from rushhour.plan import SO_FAR
    from rushhour.records.compression import COMPRESSION
    from rushhour.records.curves import CURVES
    from rushhour.records.journal import JOURNAL
    from rushhour.report import (
        SummaryTable,
        read_plan,
        write_compression_report,
        write_report,
        write_training_report,
    )

    if run.is_file():
        if run.name not in _OF_A_RUN:
            raise PlanError(
                f"{run} is no run",
                f"a run is a folder with a {_OF_A_RUN[0]}",
                "name what `rushhour tune` or `demo` made",
            )
        run = run.parent
    run = _reported(run)
    if run.is_dir():
        try_file(out or run / "report.html")
    if not (run / JOURNAL).exists():  # which a tuning run has, whatever else
        for sign, write in ((COMPRESSION, write_compression_report), (CURVES, write_training_report)):
            if (run / sign).is_file():
                file = write(run, out)
                click.echo(file)
                _write_json(json_file, {"report": str(file)})
                return
    file = write_report(run, out)
    plan, is_finished = read_plan(run)
    result_console().print(SummaryTable(plan))
    click.echo(file)
    if not is_finished:
        click.echo(f"the run was broken off, or still goes on: this is its best plan so far, {SO_FAR}", err=True)
    _write_json(json_file, {"report": str(file), "plan": plan, "finished": is_finished})


def _reported(run: Path) -> Path:
    """The folder of what is to be reported: of a bundle, the one beside it of its compression or training."""
    from rushhour.bundle import is_bundle

    run = run.parent if run.is_file() else run
    if run.exists() and not is_bundle(run):
        return run
    beside = (run.with_name(f"{run.name}-{kind}") for kind in ("steps", "training") if run.name)
    return next((folder for folder in beside if folder.is_dir()), run)


@cli.command()
@_json
def machine(json_file: Path | None) -> None:
    """What this machine is, and what each engine can do on it. To be added to a report of an error.

    The class decides what int8 means: amx and vnni add products of 8-bit numbers in 32 bits; avx2 adds pairs in 16,
    which saturate where weights use all 8 bits.
    """
    from rushhour.engines import abilities
    from rushhour.system.machine import describe, limits

    here, (allowed, quota), engines = describe(), limits(), abilities()
    granted = "no CPU quota" if quota is None else f"a CPU quota of {quota:g}"
    rows: dict[str, str] = {
        "processor": f"{here.cpu}: class {here.isa} ({' '.join(here.features) or 'no vector extensions known'})",
        "cores": f"{here.cores}: {allowed} by affinity, {granted}",
        "memory": f"{here.memory_gb:g} GiB",
        "system": f"{here.system}, Python {here.python}, Rushhour {here.versions.get('rushhour', 'not installed')}",
        **{str(name): said for name, said in engines.items()},
    }
    for name, value in rows.items():
        click.echo(f"{name:<12} {value}")
    _write_json(json_file, {**msgspec.to_builtins(here), "class": here.isa, "affinity": allowed, "quota": quota,
                            "engines": engines})  # fmt: skip


def main() -> None:
    """The entry point: turns every expected error into one line and an exit code."""
    # `module:factory` on the command line means the user's own file, most often in the folder they stand in.
    if "" not in sys.path:
        sys.path.insert(0, "")
    INTERRUPTION.begin()
    try:
        # Libraries ask for a home and a name, and fail where a container gives its user neither.
        os.environ.setdefault("HOME", str(home()))
        os.environ.setdefault("USER", str(os.getuid()))
        cli.main(prog_name="rushhour", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except _Stopped as stop:
        _stop(stop.message)
    except (click.Abort, KeyboardInterrupt):
        _stop("run it again")
    except click.ClickException as error:
        usage = f"; see {error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(" ".join(error.format_message().split()).rstrip(".") + usage)
    except Exception as error:
        if INTERRUPTION.number is not None:  # a library has made another error of it
            _stop("run it again")
        doing = " ".join(["running rushhour", *sys.argv[1:2]])
        _fail(str(error) if isinstance(error, RushhourError) else unforeseen(error, doing))


def _stop(how_to_go_on: str) -> NoReturn:
    INTERRUPTION.end()
    click.echo(f"rushhour: stopped by {INTERRUPTION.name}; {how_to_go_on}", err=True)
    sys.exit(INTERRUPTION.code)


def _fail(line: str) -> NoReturn:
    click.echo(f"rushhour: {line}", err=True)
    sys.exit(2)


def _seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        seconds = float(text[:-1]) * units[text[-1:]] if text[-1:] in units else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        raise GoalError(f"cannot use the duration {text!r}", "it is a time up to a day", "write for example 10s or 2m")
    return seconds


def _write_json(file: Path | None, result: Any) -> None:
    if file is not None:
        marked = {**msgspec.to_builtins(result), _MADE_BY: _US}
        with advised("--json"):
            write_whole(file, msgspec.json.format(msgspec.json.encode(marked), indent=2) + b"\n")


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


if __name__ == "__main__":
    main()
