"""BentoML: starts `bentoml serve` on the service beside this file, whose adaptive batching is on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench_model import PORT

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    os.environ |= {
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(Path(sys.prefix) / "bentoml-home"),
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{folder}",
    }
    os.chdir(folder)
    command = [sys.executable, "-m", "bentoml", "serve", "service:Pictures", "--host", "127.0.0.1", "--port", str(PORT)]
    os.execv(command[0], command)
