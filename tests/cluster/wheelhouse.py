"""Installed packages as wheels again, so that pip installs exactly their versions without a network."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path


def wheels_of(requirements: Sequence[str], folder: Path) -> Path:
    """A folder with a wheel of each `name==version`; the versions must be those that are installed."""
    folder.mkdir()
    for line in requirements:
        name, _, version = line.partition("==")
        installed = distribution(name)
        assert installed.version == version
        about = installed.read_text("WHEEL") or ""
        tags = [tag.split("-") for tag in re.findall(r"^Tag: (.*)$", about, re.MULTILINE)]
        tag = "-".join(".".join(sorted(set(part))) for part in zip(*tags, strict=True))
        stem = re.sub(r"[-_.]+", "_", name)
        with zipfile.ZipFile(folder / f"{stem}-{version}-{tag}.whl", "w", zipfile.ZIP_STORED) as wheel:
            for file in installed.files or ():
                if (
                    "__pycache__" not in file.parts
                    and ".." not in file.parts
                    and file.name not in ("INSTALLER", "REQUESTED")
                ):
                    wheel.write(str(file.locate()), file.as_posix())
    return folder
