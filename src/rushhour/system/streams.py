"""Standard output and standard error, wherever they lead: nothing that is printed ends the work.

A reader that has gone away (`| head -1`) is no error. A disk that is full is one, but it is said when the work is done.
What the encoding of the output cannot write is written in letters that it has.

Imported before anything slow; nothing slow may be imported here.
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
"""ASCII under a name of its own: click takes ASCII for a mistake, and writes UTF-8 instead."""
_PLAIN = {
    "✓": "+", "✕": "x", "·": "-", "★": "*", "■": "#", "●": "o", "○": "o", "…": "...", "≥": ">=", "≤": "<=", "≈": "~",
    "→": "->", "×": "x", "±": "+-", "µ": "u", "μ": "u", "–": "-", "—": "-", "−": "-", "“": '"', "”": '"', "‘": "'",
    "’": "'", "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "━": "-", "╸": "-", "╺": "-", "•": "*",
}  # fmt: skip


class _Lasting(io.RawIOBase):
    """Writes to a file descriptor; once that has failed, nowhere."""

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
            except BlockingIOError:  # whoever opened it made it so
                wait = select.poll()
                wait.register(self._descriptor, select.POLLOUT)
                wait.poll()
            except OSError as error:
                self.error = error
        return view.nbytes


_raw: dict[str, _Lasting] = {}


def settle() -> None:
    """Have this process print so from now on. A standard stream that is closed leads nowhere.

    Else the next file that is opened would take its number, and what libraries print would be written into that.
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
    """What kept standard output from taking all that was printed; None where nothing did, or nobody reads it."""
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
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is no text: as it is
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _PLAIN.get(character, "?"), error.start + 1
