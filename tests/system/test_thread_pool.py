"""Threads that end when nobody needs them, and jobs of which none is left hanging."""

import contextlib
import gc
import threading
import weakref
from concurrent.futures import CancelledError

import pytest

from mmcache.system.threads import ThreadPool
from stores_and_processes import python, threads_named, wait_for


def test_jobs_are_done_and_their_errors_kept():
    crew = ThreadPool(2, "does")
    assert not threads_named("does")
    results = [crew.submit(divmod, number, 3) for number in range(20)]
    assert [one.result() for one in results] == [divmod(number, 3) for number in range(20)]
    assert len(threads_named("does")) == 2
    failed = crew.submit(divmod, 1, 0)
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert crew.submit(int, "7").result() == 7
    crew.close()
    wait_for(lambda: not threads_named("does"))


def test_one_thread_keeps_the_order():
    crew, order = ThreadPool(1, "orders"), []
    for number in range(50):
        last = crew.submit(order.append, number)
    last.result()
    assert order == list(range(50))


@pytest.mark.parametrize("how", ["close", "drop"])
def test_what_has_not_begun_is_cancelled(how):
    crew, go, begun = ThreadPool(1, f"cancels-{how}"), threading.Event(), threading.Event()

    def work():
        begun.set()
        go.wait()
        return 5

    running, waiting = crew.submit(work), [crew.submit(int) for _ in range(10)]
    begun.wait()
    if how == "close":
        crew.close()
        crew.close()
        assert crew.submit(int).cancelled()
    del crew
    gc.collect()
    for one in waiting:
        with pytest.raises(CancelledError):
            one.result(timeout=60)
    go.set()
    assert running.result(timeout=60) == 5
    wait_for(lambda: not threads_named(f"cancels-{how}"))


def test_an_idle_thread_holds_on_to_nothing():
    class Thing:
        pass

    crew = ThreadPool(1, "holds")
    thing = Thing()
    found = crew.submit(lambda one: one, thing).result()
    assert found is thing
    gone = weakref.ref(thing)
    del thing, found
    # The thread puts its job away after it has told of the result.
    wait_for(lambda: gone() is None)
    crew.close()


def test_jobs_that_come_while_it_is_closed_do_not_hang():
    for _ in range(200):
        crew = ThreadPool(2, "races")
        crew.submit(int).result()
        closing = threading.Thread(target=crew.close)
        closing.start()
        jobs = [crew.submit(int) for _ in range(5)]
        closing.join()
        for job in jobs:
            with contextlib.suppress(CancelledError):
                assert job.result(timeout=60) == 0


@pytest.mark.parametrize("how", ["global", "raise", "exit"])
def test_the_interpreter_ends_without_doing_what_is_left(how):
    code = """
import os, sys, threading, time
from mmcache.system.threads import ThreadPool
crew, begun = ThreadPool(2, "ends"), threading.Event()
def work(number):
    begun.set()
    time.sleep(0.3)
    os.write(1, f"did {number}\\n".encode())  # whole, which print by two threads is not
jobs = [crew.submit(work, number) for number in range(5000)]
begun.wait()
if sys.argv[1] == "raise":
    raise RuntimeError
if sys.argv[1] == "exit":
    sys.exit(3)
"""
    # All of it would take ten minutes.
    done = python(code, how)
    # Those that had begun were waited for.
    assert sorted(done.stdout.split("\n")) in (["", "did 0"], ["", "did 0", "did 1"])
    assert done.returncode == {"global": 0, "raise": 1, "exit": 3}[how]
    assert ("RuntimeError" in done.stderr) == (how == "raise")
