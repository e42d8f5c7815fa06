"""`python -m rushhour.serve TARGET [settings as JSON]`: a server for another program, such as the tuner.

Says `{"url": ...}` on a line of its own when requests are welcome, or `{"error": ...}` and exits with 2. It lives as
long as its standard input is open: when the other program dies, however it dies, the server stops too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import msgspec

from rushhour.errors import RushhourError
from rushhour.serve import ServeSettings, open_target, serve


def _say(**what: str) -> None:
    print(msgspec.json.encode(what).decode(), flush=True)


def _stop_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _main(arguments: list[str]) -> int:
    try:
        settings = msgspec.json.decode(arguments[1], type=ServeSettings) if len(arguments) > 1 else ServeSettings()
        threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
        serve(open_target(Path(arguments[0])), settings, ready=lambda url: _say(url=url))
    except RushhourError as error:
        _say(error=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
