"""Standard output and standard error that never raise: a failed write does not end a command.

A closed pipe (`| head -1`) is no error. A full disk is one, which is reported at the end. Characters that the output's
encoding lacks are replaced by similar ones.

Imported before anything slow, so nothing slow may be imported here.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ERRORS = "rushhour-plain"
_ASCII = "rushhour_ascii"
"""ASCII under another name: click treats ASCII as a misconfiguration, and writes UTF-8 instead."""
_PLAIN = {
    "✓": "+", "✕": "x", "·": "-", "★": "*", "■": "#", "●": "o", "○": "o", "…": "...", "≥": ">=", "≤": "<=", "≈": "~",
    "→": "->", "×": "x", "±": "+-", "µ": "u", "μ": "u", "–": "-", "—": "-", "−": "-", "“": '"', "”": '"', "‘": "'",
    "’": "'", "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "━": "-", "╸": "-", "╺": "-", "•": "*",
}  # fmt: skip


class _Lasting(io.RawIOBase):
    """Writes to a file descriptor; after an error it discards everything."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data)
        while self.error is None:
            try:
                return os.write(self._descriptor, view)
            except BlockingIOError:  # it was opened non-blocking
                wait = select.poll()
                wait.register(self._descriptor, select.POLLOUT)
                wait.poll()
            except OSError as error:
                self.error = error
        return view.nbytes


_raw: dict[str, _Lasting] = {}


def install() -> None:
    """Replace the standard streams of this process. A closed one is opened to /dev/null first.

    Otherwise the next opened file would get its number, and libraries would print into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    codecs.register_error(_ERRORS, _plainly)
    codecs.register(_ascii)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before: io.TextIOWrapper | None = getattr(sys, name)
        encoding = "utf-8" if before is None else before.encoding
        if codecs.lookup(encoding).name == "ascii":
            encoding = _ASCII
        _raw[name] = _Lasting(number)
        stream = io.TextIOWrapper(
            io.BufferedWriter(_raw[name]),
            encoding,
            _ERRORS,
            line_buffering=number == 2 or _raw[name].isatty(),
        )
        setattr(sys, name, stream)


def failure() -> OSError | None:
    """The error that standard output had; None without one, and for a closed pipe."""
    if "stdout" not in _raw:
        return None
    sys.stdout.flush()
    error = _raw["stdout"].error
    return None if error is None or error.errno == errno.EPIPE else error


def _ascii(name: str) -> codecs.CodecInfo | None:
    if name != _ASCII:
        return None
    ascii_ = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii_.encode,
        ascii_.decode,
        streamreader=ascii_.streamreader,
        streamwriter=ascii_.streamwriter,
        incrementalencoder=ascii_.incrementalencoder,
        incrementaldecoder=ascii_.incrementaldecoder,
        name=_ASCII,
    )


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # an undecodable byte of a file name, unchanged
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _PLAIN.get(character, "?"), error.start + 1
