"""Threads that decode images: the least work first, and no thread is lost."""

import asyncio
import threading

import pytest

from ovis_jax.server.image_threads import ImageThreads


def test_small_images_do_not_wait_for_large_ones():
    started, may_end = [], threading.Event()

    def work(name):
        started.append(name)
        assert may_end.wait(60)
        return name

    async def run_all():
        threads = ImageThreads(1)
        sizes = [5, 90, 3, 70, 3, 0]
        tasks = [
            asyncio.create_task(threads.run(n, work, f"{n} at {i}")) for i, n in enumerate(sizes)
        ]
        failing = asyncio.create_task(threads.run(1, lambda: 1 / 0))
        await asyncio.sleep(0)  # all have arrived, and the first has the thread
        tasks.pop(3).cancel()
        may_end.set()
        with pytest.raises(ZeroDivisionError):
            await failing
        return await asyncio.gather(*tasks)

    results = asyncio.run(run_all())
    assert results == ["5 at 0", "90 at 1", "3 at 2", "3 at 4", "0 at 5"]
    assert started == ["5 at 0", "0 at 5", "3 at 2", "3 at 4", "90 at 1"]
