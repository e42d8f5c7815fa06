"""glibc's memory allocator: its thresholds are fixed at the start, and free memory is returned to the system.

By default, glibc raises the size from which a block is mapped on its own to that of any mapped block that was freed,
up to 32 MiB. After one large body all others come from the heap, where the smallest block that outlives them keeps
them resident. And it gives threads heaps of their own, each with leftovers of every model that was loaded there.
Sources: mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
import gc

from rushhour.system.machine import cores

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MAPPED_BYTES = 2**20
"""Blocks of at least this size are mapped, and returned whole when they are freed. Smaller ones, such as a picture of
224x224 pixels, are reused: mapping each anew costs a page fault for every 4 KiB."""
_KEPT_BYTES = 16 * 2**20
"""May stay free at the heap's end, so that it does not grow and shrink with every request."""
_FEWEST_HEAPS = 2
"""For all threads together, or one for each core if those are more: as many threads allocate at the same time."""


def fix_thresholds() -> None:
    """Fix the allocator's thresholds for this process; without effect where it is not glibc's."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_ARENA_MAX, max(_FEWEST_HEAPS, cores()))


def collect_and_trim() -> None:
    """Collect garbage, then `trim`: after a model was closed, for its engine and queue refer to each other."""
    gc.collect()
    trim()


def trim() -> None:
    """Return free memory anywhere in the heap to the system. Takes milliseconds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
