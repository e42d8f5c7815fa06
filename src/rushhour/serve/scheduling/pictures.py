"""`Pictures`: requests with encoded pictures, or with texts, on their way into a cell's queue."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rushhour.errors import WireError
from rushhour.serve.scheduling.job import Job, PictureJob, Reply, Shed, priority_of
from rushhour.serve.scheduling.preparation import Preparer
from rushhour.wire import PictureRequest

if TYPE_CHECKING:
    from rushhour.serve.scheduling.cell import Cell


class Pictures:
    """Admits or sheds requests on arrival, with the time that decoding takes; decodes them, then queues them.

    While its pictures are decoded, a request counts as waiting: its room in the queue is reserved.

    Args:
        cell: that computes them.
        decoder: of pictures, or of texts.
    """

    def __init__(self, cell: Cell, decoder: Preparer) -> None:
        self._cell = cell
        self._decoder = decoder
        self._decoding: set[PictureJob] = set()

    def submit(self, request: PictureRequest, reply: Reply) -> Job | Shed:
        """As `Cell.submit`."""
        cell, batcher, clock = self._cell, self._cell.batcher, self._cell.clock
        wanted, rows = request.wanted, request.rows
        priority = priority_of(wanted)
        arrived = clock.now()
        found = cell.deadline_of(rows, wanted, priority, self._decoder.seconds(request))
        if isinstance(found, Shed):
            return found
        deadline, _, is_probe = found
        job = PictureJob(request, reply)
        if is_probe:
            job.probe_until = deadline
        if not batcher.reserve(rows):
            return cell.no_room()

        def enter(samples: tuple[memoryview, ...] | WireError) -> None:
            self._decoded(job)
            request.pictures = ()
            if isinstance(samples, WireError):
                cell.refuse(samples.status, clock.now() - arrived)
                cell.reply_once(job, samples)
                return
            now = clock.now()
            expected_s = 0.0 if is_probe else cell.profile.seconds(min(rows, batcher.max_batch))
            if now + expected_s > deadline:
                late = cell.too_late(now - arrived, "decoding took too long to meet the deadline")
                cell.probed(job)
                cell.reply_once(job, late)
                return
            request.tensors = samples
            job.decoding_s = now - arrived
            job.ticket = batcher.offer(job, rows, deadline=math.inf if is_probe else deadline, priority=priority)
            assert job.ticket is not None  # its room was reserved
            job.ticket.arrived = job.ticket.since = arrived
            cell.dispatch_soon()

        try:
            job.decoding = self._decoder.start(request, enter)
        except BaseException:
            batcher.release(rows)
            raise
        self._decoding.add(job)
        return job

    def stop(self, job: Job) -> None:
        """Its pictures are not needed any more, if they are still being decoded."""
        if isinstance(job, PictureJob) and job.decoding is not None:
            job.decoding.cancel()
            self._decoded(job)

    def stop_all(self) -> list[PictureJob]:
        """Decode nothing more; returns the requests that were being decoded."""
        stopped = list(self._decoding)
        for job in stopped:
            self.stop(job)
        return stopped

    def _decoded(self, job: PictureJob) -> None:
        """Its pictures are decoded, or will not be: release the room reserved for it."""
        job.decoding = None
        self._decoding.discard(job)
        self._cell.batcher.release(job.request.rows)
