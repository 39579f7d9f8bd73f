"""A signal ends a job tidily, whenever it comes."""

import contextlib
import gc
import os
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from mmcache import cli
from mmcache.cli.progress import Stopped, stoppable
from stores_and_processes import at_opcode


@pytest.fixture
def heard():
    """Signals that came when nobody was to be stopped."""
    found = []
    before = {
        number: signal.signal(number, lambda number, _: found.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_the_block_and_says_which_it_was(heard, number):
    with pytest.raises(Stopped) as told, stoppable("left"):
        os.kill(os.getpid(), number)
    assert (told.value.number, told.value.left) == (number, "left")
    os.kill(os.getpid(), number)
    assert heard == [number], "who listened before listens again"


def test_a_second_one_does_not_interrupt_the_tidying_up(heard):
    tidied = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            tidied.append(True)

    with pytest.raises(Stopped), stoppable("left"):
        work()
    assert tidied
    assert not heard


@pytest.fixture
def young():
    """Collections look at what is made from here on, and not each time at all that other tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("heard", "young")
def test_one_that_comes_while_the_block_is_left_is_told_too(monkeypatch):
    leaving = contextlib._GeneratorContextManager.__exit__.__code__
    ends = []
    for at in range(1, 200):
        command = click.Command("job", callback=lambda: leave(at))  # noqa: B023 -- run at once

        def leave(at):
            trace, steps = at_opcode(at, lambda code: code is leaving, lambda: os.kill(os.getpid(), signal.SIGTERM))
            try:
                with stoppable("left"):
                    sys.settrace(trace)
            finally:
                sys.settrace(None)
            if steps() < at:
                ends.append("over")

        monkeypatch.setattr(cli._Group, "get_command", lambda *_, command=command: command)
        monkeypatch.setattr(cli, "_COMMANDS", {"job": ""})
        done = CliRunner().invoke(cli.main, ["job"])
        gc.collect()  # what was not left properly
        if ends and ends[-1] == "over":
            break
        ends.append(done.exit_code)
        assert done.exit_code in (0, 128 + signal.SIGTERM), done.exception
        assert done.exit_code == 0 or "mmcache: stopped. left" in done.output
    # Both while it could still be stopped, and when that was over.
    assert ends[-1] == "over"
    assert {0, 128 + signal.SIGTERM} <= set(ends)


class _OutsideError(Exception):
    """What a signal raises that comes before the command heeds it, or after."""


def _outside(*_):
    raise _OutsideError


def _signal_at(at):
    """A trace function that sends SIGTERM at step `at` of the interpreter in the guard around a job."""
    return at_opcode(
        at, lambda code: code.co_name in {"stoppable", "stop"}, lambda: signal.raise_signal(signal.SIGTERM)
    )


def _end_of_a_job(out, at):
    """How the guard around an empty job ends if a signal comes at step `at`, and how many steps it took."""
    enter, steps = _signal_at(at)
    trace = sys.gettrace()
    try:
        sys.settrace(enter)
        with stoppable(str(out)):
            pass
    except Stopped as stopped:
        return 128 + stopped.number, steps()
    except _OutsideError:
        return "outside", steps()
    finally:
        sys.settrace(trace)
    return "done", steps()


def test_a_signal_at_the_very_begin_or_end_of_a_job_is_heeded_or_comes_too_late(tmp_path):
    before, ends = signal.signal(signal.SIGTERM, _outside), []
    try:
        _, steps = _end_of_a_job(tmp_path, 0)
        for at in range(1, steps + 1):
            ends.append(_end_of_a_job(tmp_path, at)[0])
            assert signal.signal(signal.SIGTERM, _outside) is _outside
    finally:
        signal.signal(signal.SIGTERM, before)
    # And nothing else: no signal is told as a traceback.
    assert set(ends) == {"outside", 143, "done"}
    assert ends.count(143) > 5
    assert ends[0] == ends[-1] == "outside"


@pytest.mark.parametrize(("name", "interrupted"), [("mmcache", True), ("other", False)])
def test_ctrl_c_ends_the_commands_imports_without_a_traceback_and_leaves_programs_their_own(name, interrupted):
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts, wherever these tests run
sys.argv[0] = "/bin/{name}"
class Interrupt:
    def find_spec(self, name, *_):
        if name == "zarr":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
try:
    import mmcache
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    expected = (-signal.SIGINT, "") if interrupted else (0, "heard\n")
    assert (done.returncode, done.stdout) == expected
    assert done.stderr == ""


def test_the_command_has_pythons_handler_again():
    script = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts, wherever these tests run
sys.argv[0] = "mmcache"
import mmcache
assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
import mmcache.cli
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    subprocess.run([sys.executable, "-c", script], check=True)
