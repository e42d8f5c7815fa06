"""Connections are shared out over worker processes: real sockets, real cells."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import uvloop
from test_lifecycle import metric
from test_supervisor import IMAGES, cells_of, wait_until

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.serve import ServeSettings
from rushhour.serve.seats import Balance, Seat, Seats
from rushhour.testing.bundles import tiny_answers
from rushhour.wire import encode_request

TRIES = 3
"""A cell whose event loop was held up for a second gets no connections meanwhile: the test runs beside others."""


def connections_of(pid: int, port: int) -> int:
    """How many TCP connections to the port the process holds."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = {line[9] for line in lines if line[3] == "01" and int(line[1].partition(":")[2], 16) == port}
    held = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            held += os.readlink(file).removeprefix("socket:[").removesuffix("]") in established
    return held


def shares(server: Server, bundle: Bundle, connections: int) -> list[int]:
    """Of so many connections those of each cell, once each has answered; all of them are closed again."""
    length, body = encode_request(bundle.manifest.signature, {"image": IMAGES})
    headers = {"Inference-Header-Content-Length": str(length)}
    clients = [http.client.HTTPConnection(*server.address, timeout=20) for _ in range(connections)]
    try:
        for client in clients:  # each sends as soon as it is connected: nothing of it may be lost on the way
            client.request("POST", "/v2/models/tiny/infer", body, headers)
        for client in clients:
            answer = client.getresponse()
            assert answer.status == 200
            got = np.frombuffer(answer.read()[-24:], np.float32).reshape(2, 3)
            np.testing.assert_allclose(got, tiny_answers(IMAGES), atol=1e-5)
        return [connections_of(pid, server.address[1]) for pid in cells_of(server)]
    finally:
        for client in clients:
            client.close()


def is_even(server: Server, bundle: Bundle) -> bool:
    """By chance, as the kernel spreads them, it is once in thirty times."""
    for _ in range(TRIES):
        found = shares(server, bundle, 48)
        assert sum(found) == 48
        if max(found) - min(found) <= 2:
            return True
    return False


def test_connections_are_shared_out_evenly_after_a_death_too(tiny: Bundle) -> None:
    """The kernel gives to each at random: one of four cells had 30 of 100, and was full when the others were not."""
    with serving(tiny.path, ServeSettings(http_port=0, cells=4)) as server:
        assert is_even(server, tiny)
        killed = cells_of(server)[0]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in cells_of(server) and metric(server.address, 'rushhour_cells{state="up"}') == 4)
        assert is_even(server, tiny)


class Says(asyncio.Protocol):
    """Tells a client its name."""

    def __init__(self, name: bytes, balance: Balance) -> None:
        self._name = name
        self._balance = balance

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._name)  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        self._balance.closed()


@contextlib.contextmanager
def seats(cells: int) -> Iterator[tuple[Seats, list[Balance]]]:
    kept = Seats(cells)

    def duplicate(seat: Seat) -> Seat:  # as the processes inherit them
        return Seat(seat.number, os.dup(seat.table), os.dup(seat.inbox), tuple(map(os.dup, seat.outboxes)))

    balances = [Balance(duplicate(kept.seat(number))) for number in range(cells)]
    try:
        yield kept, balances
    finally:
        for balance in balances:
            balance.close()
        kept.close()


@contextlib.asynccontextmanager
async def there(balance: Balance, name: bytes) -> AsyncIterator[None]:
    task = asyncio.ensure_future(balance.run(lambda: Says(name, balance)))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def greetings(port: int, clients: int) -> bytes:
    """What each of so many clients hears, who all stay until the last has heard."""
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
    heard = b"".join([await reader.readexactly(1) for reader, _ in opened])
    for _, writer in opened:
        writer.close()
        await writer.wait_closed()
    await asyncio.sleep(0.05)
    return heard


@pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_who_is_not_there_gets_nothing(loops: object) -> None:
    async def main(first: Balance, second: Balance) -> None:
        accepting = first.accepting(lambda: Says(b"1", first))
        server = await asyncio.get_running_loop().create_server(accepting, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, there(first, b"1"):
            assert await greetings(port, 6) == b"111111", "the second has not begun"
            async with there(second, b"2"):
                assert sorted(await greetings(port, 6)) == sorted(b"121212")
                assert sorted(await greetings(port, 6)) == sorted(b"121212"), "those that have ended do not count"
                second.leave()
                assert await greetings(port, 6) == b"111111", "it is about to end"
            assert await greetings(port, 6) == b"111111"

    with seats(2) as (_, (first, second)), asyncio.Runner(loop_factory=loops) as runner:  # type: ignore[arg-type]
        runner.run(main(first, second))


def test_where_it_cannot_be_handed_over_it_stays() -> None:
    async def main(first: Balance, second: Balance) -> None:
        accepting = first.accepting(lambda: Says(b"1", first))
        server = await asyncio.get_running_loop().create_server(accepting, "127.0.0.1", 0)
        async with server, there(first, b"1"), there(second, b"2"):
            first._outboxes[1].shutdown(socket.SHUT_WR)
            assert await greetings(server.sockets[0].getsockname()[1], 6) == b"111111"

    with seats(2) as (_, (first, second)), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(first, second))


def test_what_was_handed_to_a_cell_that_died_goes_to_another() -> None:
    """A cell that was killed and could not start again kept its clients waiting."""

    async def main(kept: Seats, first: Balance, second: Balance, third: Balance) -> None:
        accepting = first.accepting(lambda: Says(b"1", first))
        server = await asyncio.get_running_loop().create_server(accepting, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, there(first, b"1"), there(third, b"3"):
            second._own[0] = np.inf  # it was there a moment ago
            clients = [asyncio.ensure_future(greetings(port, 1)) for _ in range(6)]
            await asyncio.sleep(0.2)
            assert not all(client.done() for client in clients), "some were handed to it"
            kept.vacate(1)
            assert set(b"".join(await asyncio.gather(*clients))) <= set(b"13")
            assert set(await greetings(port, 6)) <= set(b"13"), "nothing is handed to it any more"

    with seats(3) as (kept, balances), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(kept, *balances))
