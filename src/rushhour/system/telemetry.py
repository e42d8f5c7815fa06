"""Nothing about a user's models leaves his machine: the packages we run on do not report to their makers.

OpenVINO and NNCF send an event to Google Analytics when they are imported, and leave a client's number in the home
folder. ONNX Runtime does the same with Microsoft from 1.29 on (microsoft/onnxruntime#27379).
"""

from __future__ import annotations

import os
import sys


def keep_home() -> None:
    """To be called before `openvino`, `nncf` or `onnxruntime` is imported; later it has no effect. Repeatable.

    Both ways out are closed for the whole process, and for its children. A person who sets `ORT_DISABLE_TELEMETRY`,
    or imports `openvino_telemetry` before us, has made a choice of his own, and it stands.
    """
    # Where the package cannot be imported, OpenVINO and NNCF do without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    # A full opt-out, but only before the package is loaded; its own disable_telemetry_events() comes too late.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
