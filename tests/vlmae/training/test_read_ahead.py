"""Batches are copied to the devices while a step runs."""

import gzip
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmae.training.read_ahead import AHEAD, ReadAhead


def test_order_and_end_are_those_of_the_batches():
    with ReadAhead(iter(range(5)), lambda x: x * 10) as batches:
        assert list(batches) == [0, 10, 20, 30, 40]
        assert next(batches, "end") == "end"  # and again
    with ReadAhead(iter(()), lambda x: x) as batches:
        assert list(batches) == []


def test_the_next_batches_come_while_a_step_runs():
    """And no more than promised: they fill the devices' memory."""
    taken, came = [], threading.Semaphore(0)

    def put(x: int) -> int:
        taken.append(x)
        came.release()
        return x

    with ReadAhead(iter(range(10)), put) as batches:
        assert next(batches) == 0
        for _ in range(1 + AHEAD):  # here a step would run; nobody asks for a batch
            assert came.acquire(timeout=10)
        time.sleep(0.05)
        assert taken == list(range(1 + AHEAD))


def test_an_error_is_raised_where_its_batch_would_have_come():
    def batches():
        yield 0
        yield 1
        raise OSError("disk")

    with ReadAhead(batches(), lambda x: x) as ahead:
        assert (next(ahead), next(ahead)) == (0, 1)
        with pytest.raises(OSError, match="disk"):
            next(ahead)


def test_leaving_ends_the_thread_before_the_batches_are_closed():
    """A generator that is running cannot be closed."""
    started, closed = threading.Event(), []

    def slow():
        try:
            while True:
                started.set()
                time.sleep(0.1)
                yield 0
        finally:
            closed.append(True)

    source = slow()
    with ReadAhead(source, lambda x: x):
        assert started.wait(10)
    source.close()
    assert closed
    assert not [x for x in threading.enumerate() if x.name.startswith("read-ahead")]


def spans(folder, name: str) -> list[tuple[float, float]]:
    """Begin and end, in microseconds, of the events of this name in a profile."""
    [path] = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [(x["ts"], x["ts"] + x["dur"]) for x in events if x.get("name") == name and "dur" in x]


def test_a_profile_shows_the_next_batch_on_its_way_while_a_step_runs(tmp_path):
    """Every copy but those before the first step begins before the step before it ends."""
    step = jax.jit(lambda x, batch: jnp.sin(x @ x) + batch.mean())
    x = step(jnp.eye(700), np.zeros((64, 256, 256), np.float32))
    rng = np.random.default_rng(0)
    source = iter([rng.random((64, 256, 256), np.float32) for _ in range(6)])
    jax.profiler.start_trace(tmp_path)
    with ReadAhead(source, jax.device_put) as batches:
        for batch in batches:
            with jax.profiler.TraceAnnotation("step"):
                for _ in range(4):
                    x = step(x, batch)
                jax.block_until_ready(x)
    jax.profiler.stop_trace()
    steps, copies = spans(tmp_path, "step"), spans(tmp_path, "copy a batch to the devices")
    assert len(steps) == len(copies) == 6
    for (_, step_end), (copy_begin, _) in zip(sorted(steps), sorted(copies)[1:], strict=False):
        assert copy_begin < step_end
