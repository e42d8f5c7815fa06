"""The verb `serve`: runs, plans, bundles or a model from elsewhere become a running server."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from rushhour.api.importing import import_model
from rushhour.api.values import StrPath, read_path, read_texts
from rushhour.errors import ServeError
from rushhour.system.storage import try_file

if TYPE_CHECKING:
    from rushhour.serve import Served, ServeSettings
    from rushhour.serve.child import ChildServer

_ALL_AT_ONCE = "cells", "fixed", "grpc_port", "host", "http_port", "model_name", "streams", "threads", "trust"

Imported = tempfile.TemporaryDirectory[str]
"""The folder of a model that was imported to be served."""


class Server:
    """A running server, in a process of its own. Close it, or use it as a context manager.

    It also stops when this process ends. Its string is its URL.

    Attributes:
        url: where it answers over HTTP: `http://127.0.0.1:8000`.
        grpc_url: the same over gRPC: `grpc://127.0.0.1:8001`; None without.
        model: the model's name in requests; of several the first one's.
        models: the names of all of them.
        way: what it serves and how: bundle, engine, precision, streams, threads, largest batch.
    """

    def __init__(self, child: ChildServer, models: Sequence[str], imported: Imported | None = None) -> None:
        self._child = child
        self._imported = imported
        self.url = child.url
        self.grpc_url = f"grpc://{child.grpc}" if child.grpc else None
        self.models = tuple(models)
        self.model = self.models[0]
        self.way = child.way

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the server: accept nothing new, answer what is in flight for at most `timeout_s`, end. Repeatable."""
        self._child.close(timeout_s)
        if self._imported is not None:
            self._imported.cleanup()

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self._child.is_running

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"<rushhour.api.Server {self.url}, {', '.join(self.models)}: {self.way}>"


def serve(
    target: StrPath | Any | Sequence[StrPath] = None,
    *,
    repository: StrPath | None = None,
    load_model: str | Sequence[str] = (),
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int | None = 8001,
    model_name: str | Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    cells: int | None = None,
    streams: int | None = None,
    threads: int | None = None,
    fixed: bool = False,
    trust: str | Sequence[str] = (),
    settings: ServeSettings | None = None,
    log_file: StrPath | None = None,
) -> Server:
    """Start a server in a process of its own, and return once it answers (Open Inference Protocol v2, HTTP and gRPC).

        with rushhour.serve("runs/photos", http_port=0, grpc_port=None) as server:
            print(server.url, server.model)
        server = rushhour.serve(tuned, settings=ServeSettings(http_port=8080, log_requests=True))
        both = rushhour.serve(["runs/photos", "runs/texts"], weights={"texts": 2})
        many = rushhour.serve(repository="models")

    Args:
        target: a run's folder, a plan's file, a bundle, or the result of `tune`, `compress` or `train`; or a model from
            elsewhere, as of `rushhour.import_model`, which is imported first, for as long as it is served. A list of
            runs, plans and bundles is served behind one port.
        repository: a folder of runs and bundles, all of which are served under the names of their folders, in place of
            `target`; clients may load those that are added later.
        load_model: load only these of the repository at the start.
        host: where it listens. Beyond loopback it needs keys or `exposed`, which are in `settings`.
        http_port: 0 takes a free one.
        grpc_port: 0 takes a free one; None serves over HTTP only.
        model_name: the model's name in requests; that of the tuned model by default. Of several models one for each.
        weights: shares of the cores that several models have while all have requests, by their names; 1 by default.
        cells: processes that share the port; the plan's number by default.
        streams: batches that each cell runs at the same time; the plan's number by default.
        threads: CPU threads of each stream; as the plan says by default, as far as they fit.
        fixed: serve the plan's first variant whatever the load, though the plan has a ladder.
        trust: factories (`module:factory`) that the torch engine may import; or the path of a model from elsewhere,
            where reading it runs its code.
        settings: a `rushhour.serve.ServeSettings` with everything that a server can be told (TLS, keys, limits,
            logs, drain, ...), in place of all arguments above.
        log_file: where the server's log goes; nowhere by default. What was in the file is kept.

    Raises:
        PlanError: if there is nothing to serve at `target`.
        BundleError: if the bundle is damaged, or not the one that the plan was made for.
        ServeError: if the server does not start: the port is taken, or no engine runs the bundle here.
    """
    from rushhour.serve import ServeSettings, may_be_model, open_target
    from rushhour.serve.child import ChildServer

    name = model_name if isinstance(model_name, str) else None
    chosen = ServeSettings(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        model=name,
        cells=cells,
        streams=streams,
        threads=threads,
        fixed=fixed,
        trusted=read_texts(trust),
        exact=False,
    )
    if settings is not None:
        if chosen != ServeSettings(grpc_port=8001, exact=False) or model_name is not None:
            raise ServeError(
                "the settings of the server are given in two ways",
                f"`settings` is in place of {', '.join(_ALL_AT_ONCE)}",
                "give either",
            )
        chosen = settings
    log = None if log_file is None else read_path(log_file)
    if log is not None:
        try_file(log)
    models = _several(target, repository, load_model, model_name, weights)
    if models:
        chosen = msgspec.structs.replace(
            chosen,
            model=None if settings is None else chosen.model,
            models=models,
            repository=None if repository is None else str(read_path(repository)),
        )
        return Server(ChildServer(Path(models[0].path), chosen, log), [each.name for each in models])
    imported = None
    try:
        path = read_path(target) if isinstance(target, str | os.PathLike) else None
        if path is None or may_be_model(path):
            imported, path = _imported(target, trust, name)
        opened = open_target(path)  # errors in the target are raised here, with their own types
        return Server(ChildServer(path, chosen, log), [chosen.model or opened.name], imported)
    except BaseException:
        if imported is not None:
            imported.cleanup()
        raise


def _several(
    target: Any,
    repository: StrPath | None,
    load_model: str | Sequence[str],
    model_name: str | Sequence[str] | None,
    weights: Mapping[str, float] | None,
) -> tuple[Served, ...]:
    """The models of a server that has several, or a repository; none where there is one model.

    Raises:
        ServeError: if the arguments do not fit each other; and as `serve`.
    """
    from rushhour.serve import Folder, hosted

    if (target is None) == (repository is None):
        raise ServeError("cannot tell what to serve", "it is either `target` or `repository`", "give one of them")
    many = isinstance(target, list | tuple)
    if repository is None and load_model:
        raise ServeError("`load_model` has no effect", "it names models of a repository", "omit it")
    if not (many or repository is not None) and (weights or not isinstance(model_name, str | None)):
        what = "weights" if weights else "several names"
        raise ServeError(f"{what} are given for one model", "they are for a list of models", "omit them")
    if repository is not None:
        if model_name is not None:
            raise ServeError(
                "`model_name` has no effect", "models of a repository have their folders' names", "omit it"
            )
        return Folder(read_path(repository), weights).all(read_texts(load_model))
    if not many:
        return ()
    return hosted([read_path(each) for each in target], read_texts(model_name or ()), weights)


def _imported(target: Any, trust: str | Sequence[str], name: str | None) -> tuple[Imported, Path]:
    folder: Imported = tempfile.TemporaryDirectory(prefix="rushhour-", ignore_cleanup_errors=True)
    bundle = Path(folder.name) / "bundle"
    try:
        import_model(target, out=bundle, trust=trust, name=name)
    except BaseException:
        folder.cleanup()
        raise
    return folder, bundle
