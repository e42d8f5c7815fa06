"""Ray Serve: starts the service beside this file behind Ray's HTTP proxy, behind nothing, or behind Ray's HAProxy."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from bench_model import INSTANCES, PORT, WAY


def switches() -> dict[str, str]:
    """What Ray reads from the environment when it is imported, for this way."""
    if WAY == "direct":
        # The one replica takes the first port of its range; the proxy, which stays all the same, another one.
        return {
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(PORT),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(PORT + 1),
            "BENCH_PORT": str(free_port()),
        }
    if WAY == "haproxy":
        folder = Path(os.environ["BENCH_WORK"]) / "haproxy"
        return {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(INSTANCES),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        }
    return {}


def free_port() -> int:
    """A port on 127.0.0.1 that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    # Ray's own switch for requests per second; time to start on a core that is shared, or Ray kills its proxy; the way.
    os.environ |= {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_AUTH_MODE": "disabled",  # else it leaves a token in the home folder, for which other Rays ask
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        **switches(),
    }
    os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("service.py"))])
