"""How a server keeps memory and gives it back: the allocator's rules, said instead of learned from the traffic.

Left alone, glibc raises the size from which a block is mapped on its own to that of any mapped block that was freed,
up to 32 MiB: after one large body all others come from the heap, where the smallest that outlives them keeps them
resident. And it gives threads heaps of their own, each with its own leftovers of every model that was loaded there.
Sources: mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
import gc

from rushhour.system.machine import cores

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MAPPED_BYTES = 2**20
"""Blocks from this size on are mapped, and go back whole when they are freed. Smaller ones, such as a picture of
224x224 pixels, are reused: each mapping anew costs a page fault for every 4 KiB."""
_KEPT_BYTES = 16 * 2**20
"""What may lie free at the heap's end, so that requests do not make it grow and shrink by turns."""
_FEWEST_HEAPS = 2
"""For all threads together, or one for each core if those are more: as many can ask at the same time."""


def settle() -> None:
    """Fix the allocator's rules for this process; without effect where it is not glibc's."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_ARENA_MAX, max(_FEWEST_HEAPS, cores()))


def give_back() -> None:
    """Return what lies free anywhere in the heap: after something large has gone. Takes milliseconds.

    What holds itself is collected first: a model's engine and queue do, and pages around it would stay.
    """
    gc.collect()
    trim()


def trim() -> None:
    """The same without the collector, which would hold all threads up."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
