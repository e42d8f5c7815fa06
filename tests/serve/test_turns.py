"""Large bodies are read in turn: many at once do not keep the event loop from everybody else."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from socket import create_connection, socket

import pytest
import uvloop
from test_loop import READY, Answer, Client, images_of, in_json, post, served

from rushhour.bundle import Bundle
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.protocols.http.turns import TURN_BYTES, Turns
from rushhour.serve.protocols.http.upload import Upload

CLIENTS = 12
SIZE = 2**21
"""Bytes of a body, most of them spaces behind the JSON."""


class Sender:
    """A connection of which the next part of a body is there whenever it may read."""

    def __init__(self, name: str, parts: int, turns: Turns, order: list[str]) -> None:
        self.name, self.parts, self.turns, self.order = name, parts, turns, order

    def go_on(self) -> None:
        asyncio.get_running_loop().call_soon(self.read)

    def read(self) -> None:
        self.order.append(self.name)
        self.parts -= 1
        if self.parts and not self.turns.has_to_wait(self, TURN_BYTES):
            self.go_on()


def read_by_turns(*senders: tuple[str, int]) -> list[str]:
    order: list[str] = []

    async def scenario() -> None:
        turns = Turns()
        everyone = [Sender(name, parts, turns, order) for name, parts in senders]
        for each in everyone:
            each.read()
        while any(each.parts for each in everyone):
            await asyncio.sleep(0)

    asyncio.run(scenario())
    return order


def test_who_has_the_turn_keeps_it_until_the_body_is_complete() -> None:
    order = read_by_turns(("a", 4), ("b", 3), ("c", 2))
    assert order[:3] == ["a", "b", "c"], "what has come by itself"
    assert order[3:] == ["a", "a", "a", "b", "b", "c"]


def test_a_body_within_a_turn_does_not_wait() -> None:
    async def scenario() -> None:
        turns = Turns()
        sender = Sender("a", 1, turns, [])
        assert not turns.has_to_wait(sender, TURN_BYTES // 2)
        assert turns.has_to_wait(sender, TURN_BYTES // 2), "together they are a turn"
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not turns.has_to_wait(sender, TURN_BYTES // 2), "a new turn"

    asyncio.run(scenario())


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_many_large_bodies_are_read_a_part_in_each_turn_of_the_loop(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """First by the parser, which does not know the heads of a new connection; then into buffers of their own."""
    read: list[tuple[int, int]] = []
    counting = [HttpConnection.data_received, Upload.buffer_updated]

    def data_received(self: HttpConnection, data: bytes) -> None:
        read.append((id(self), len(data)))
        counting[0](self, data)

    def buffer_updated(self: Upload, nbytes: int) -> None:
        read.append((id(self), nbytes))
        counting[1](self, nbytes)

    monkeypatch.setattr(HttpConnection, "data_received", data_received)
    monkeypatch.setattr(Upload, "buffer_updated", buffer_updated)
    images = images_of(3)
    sent = post(in_json(images).ljust(SIZE))

    async def scenario() -> None:
        with ThreadPoolExecutor(CLIENTS) as clients:
            await ask_all(clients)

    async def ask_all(clients: ThreadPoolExecutor) -> None:
        async with served(tiny, queue_bound=4096) as server:
            running = asyncio.get_running_loop()
            sockets = [create_connection(server.address) for _ in range(CLIENTS)]
            small = await Client.to(server.address)
            for _ in ("by the parser", "into a buffer"):
                answers = [running.run_in_executor(clients, _ask, each, sent) for each in sockets]
                asked = asyncio.ensure_future(_ask_again(small, answers))
                most, had = 0, Counter[int]()
                time.sleep(0.1)  # the senders fill the sockets meanwhile
                while not all(each.done() for each in answers):
                    read.clear()
                    await asyncio.sleep(0)
                    most = max(most, sum(size for reader, size in read if had[reader] > TURN_BYTES))
                    for reader, size in read:
                        had[reader] += size
                assert 0 < most <= 4 * TURN_BYTES, f"{most} bytes in one turn of the event loop"
                for each in answers:
                    answer = await each
                    assert answer.status == 400
                    assert b"it is too long" in answer.body, "all of it was read"
                assert await asked > CLIENTS
            for each in sockets:
                each.close()

    def _ask(connection: socket, whole: bytes) -> Answer:
        connection.sendall(whole)
        head, _, body = connection.recv(2**16).partition(b"\r\n\r\n")
        return Answer(int(head.split()[1]), {}, body)

    async def _ask_again(small: Client, until: list[asyncio.Future[Answer]]) -> int:
        count = 0
        while not all(each.done() for each in until):
            assert (await small.ask(READY)).status == 200
            count += 1
        return count

    with closing(loop()) as made:
        made.run_until_complete(asyncio.wait_for(scenario(), 60))
