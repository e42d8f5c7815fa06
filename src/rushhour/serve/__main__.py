"""`python -m rushhour.serve TARGET [SETTINGS|-]`: a server for another program: a supervisor, the tuner, a test.

Settings are JSON, on the command line or, with `-`, on the first line of standard input (others can read a command
line). It says `{"url": ..., "grpc": ...}` on a line of its own when requests are welcome, or `{"error": ...}` and exits
with 2. It lives as long as its standard input is open: when the other program dies, however it dies, the server stops
too. Further lines of input are a supervisor's orders.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rushhour.serve.processes.signals import SIGNALS


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _main(arguments: list[str]) -> int:
    # Signals are heard before the rest is imported, which takes its time.
    SIGNALS.early()
    import msgspec

    from rushhour.errors import RushhourError
    from rushhour.serve.processes.messages import Said
    from rushhour.serve.processes.watchdog import Tether
    from rushhour.serve.server import serve
    from rushhour.serve.settings import ServeSettings
    from rushhour.serve.target import open_planned, open_target

    def say(said: Said) -> None:
        _write(msgspec.json.encode(said) + b"\n")

    def ready(url: str, grpc: str | None, way: str) -> None:
        say(Said(url=url, grpc=grpc or "", way=way))

    orders = io.FileIO(0, closefd=False)
    try:
        path, text = Path(arguments[0]), arguments[1] if len(arguments) > 1 else "{}"
        settings = msgspec.json.decode(orders.readline() if text == "-" else text, type=ServeSettings)
        tether = Tether(orders, _write)
        served = settings.served
        target = open_target(path) if served is None else open_planned(path, served.plan, Path(served.folder))
        serve(target, settings, ready=ready, tether=tether)
    except RushhourError as error:
        say(Said(error=str(error)))
        return 2
    except msgspec.DecodeError as error:
        say(Said(error=f"cannot read the settings: {error}; they are JSON, as in rushhour.serve.ServeSettings"))
        return 2
    except Exception as error:
        from rushhour.system.faults import unforeseen

        say(Said(error=unforeseen(error, "serving")))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
