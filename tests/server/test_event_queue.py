"""event_queue.py: the events of a step wake the event loop once, and each arrives in its queue, in order."""

import asyncio
import threading

import pytest

from pshare_jax.engine.request import Event
from pshare_jax.server.event_queue import Mailbox

pytestmark = pytest.mark.host


def test_all_events_that_arrive_before_the_loop_runs_wake_it_once(monkeypatch):
    async def main():
        loop = asyncio.get_running_loop()
        wakes, call = [], loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: wakes.append(args) or call(*args))
        mailbox, queues = Mailbox(loop), [asyncio.Queue() for _ in range(64)]
        for step in range(1, 4):
            for row, queue in enumerate(queues):
                mailbox.put(queue, (row, Event(completion_tokens=step)))
            assert len(wakes) == step
            got = [await queue.get() for queue in queues]
            assert [(row, event.completion_tokens) for row, event in got] == [(row, step) for row in range(64)]

    asyncio.run(main())


def test_nothing_is_lost_or_reordered_between_threads():
    num, num_threads = 3000, 4

    async def main():
        mailbox, queue = Mailbox(asyncio.get_running_loop()), asyncio.Queue()

        def work(index):
            for step in range(num):
                mailbox.put(queue, (index, Event(completion_tokens=step)))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
        for thread in threads:
            thread.start()
        got = [await asyncio.wait_for(queue.get(), 60) for _ in range(num * num_threads)]
        for index in range(num_threads):
            assert [event.completion_tokens for thread, event in got if thread == index] == list(range(num))

    asyncio.run(main())


def test_events_after_the_end_of_the_loop_are_ignored():
    async def make():
        return Mailbox(asyncio.get_running_loop()), asyncio.Queue()

    mailbox, queue = asyncio.run(make())
    mailbox.put(queue, (0, Event()))
    assert queue.empty()
