"""Telemetry of the packages below is off: nothing about a user's models leaves the machine.

OpenVINO and NNCF send an event to Google Analytics on import, and write a client ID to the home folder. ONNX Runtime
sends events to Microsoft from 1.29 on (microsoft/onnxruntime#27379).
"""

from __future__ import annotations

import os
import sys


def disable_telemetry() -> None:
    """Switch it off for this process and its children. Repeatable.

    To be called before `openvino`, `nncf` or `onnxruntime` is imported; later it has no effect. A user who sets
    `ORT_DISABLE_TELEMETRY`, or imports `openvino_telemetry` first, has chosen otherwise, and that is respected.
    """
    # OpenVINO and NNCF work without the package.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    # It counts only before the package is loaded; its disable_telemetry_events() is too late.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
