"""`python -m rushhour.serve TARGET [SETTINGS|-]`: a server for another program: a supervisor, the tuner, a test.

Where the settings name models, these are served, and TARGET only shows in the list of processes.
Settings are JSON, on the command line or, with `-`, on the first line of standard input (other users can read a command
line). When requests are accepted it writes `{"url": ..., "grpc": ...}` on one line, or `{"error": ...}` and exits with
2. It runs as long as its standard input is open: when the parent process ends, in whatever way, the server stops too.
Further lines of input are a supervisor's commands.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rushhour.serve.processes.signals import SIGNALS
from rushhour.system import exit


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _main(arguments: list[str]) -> int:
    # Signals are handled before the rest is imported, which takes long.
    exit.install()
    SIGNALS.install()
    import msgspec

    from rushhour.errors import RushhourError
    from rushhour.serve.processes.messages import FromWorker
    from rushhour.serve.processes.watchdog import ParentWatchdog
    from rushhour.serve.server import serve
    from rushhour.serve.settings import ServeSettings
    from rushhour.serve.target import open_target

    def send(message: FromWorker) -> None:
        _write(msgspec.json.encode(message) + b"\n")

    def ready(url: str, grpc: str | None, way: str) -> None:
        send(FromWorker(url=url, grpc=grpc or "", way=way))

    messages = io.FileIO(0, closefd=False)
    try:
        path, text = Path(arguments[0]), arguments[1] if len(arguments) > 1 else "{}"
        settings = msgspec.json.decode(messages.readline() if text == "-" else text, type=ServeSettings)
        watchdog = ParentWatchdog(messages, _write)
        serve(settings.models or open_target(path), settings, ready=ready, watchdog=watchdog)
    except RushhourError as error:
        send(FromWorker(error=str(error)))
        return 2
    except msgspec.DecodeError as error:
        send(FromWorker(error=f"cannot read the settings: {error}; they are JSON, as in rushhour.serve.ServeSettings"))
        return 2
    except Exception as error:
        from rushhour.system.faults import report_unexpected

        send(FromWorker(error=report_unexpected(error, "serving")))
        return 2
    return 0


if __name__ == "__main__":
    exit.leave(_main(sys.argv[1:]))
