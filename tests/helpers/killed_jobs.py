"""Jobs in forks, killed at a moment or at a write.

A job killed again and again, at any moment, ends in the very bytes of one that never was.

Most of a short job's time is Python importing torch. So one process imports everything, and forks for each run: from
there on it is the command line's own code, and it is killed as any process is.
"""

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stores_and_processes import wait_for

SHARDS = 40
SETTLED = 60  # seconds: far more than it takes to put away what is under way
HANGING = 300


def serve():
    """Run commands for `Runner`, each in a fork."""
    import transformers  # noqa: PLC0415 -- in the process that forks only

    from mmcache import cli  # noqa: PLC0415
    from mmcache.cli import extract  # noqa: PLC0415
    from mmcache.extraction import tokenization  # noqa: PLC0415
    from mmcache.storage import object_store  # noqa: PLC0415
    from mmcache.system import atomic  # noqa: PLC0415

    _ = transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    tokenization._TOKENS_A_COMMIT = 300  # so that tokenising, too, is killed between two commits
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]))
            continue
        ready, tell = os.pipe()
        pid = os.fork()
        if not pid:
            become(asked, extract, atomic, tell)
            if asked["hang"]:
                hang(object_store.ObjectStore, *asked["hang"])
            cli.main()
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        answer(pid)


def answer(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def become(asked, extraction, draft, tell):
    """Be a process of its own: its streams, its arguments, and where it kills itself, or stops until it is killed."""
    sys.argv = ["mmcache", *asked["start"]]
    for stream, path in ((0, os.devnull), (1, os.devnull), (2, asked["errors"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # what comes before or after the job is Python's business, not the job's
    stoppable, publish, left = extraction.stoppable, draft.AtomicFile.publish, asked["writes"]

    @contextlib.contextmanager
    def telling(out):
        with stoppable(out):
            os.write(tell, b"!")
            yield

    def counted(draft, size, **options):
        nonlocal left
        left -= 1
        if left == 0 and not asked["after"]:
            os.kill(os.getpid(), asked["how"])
        publish(draft, size, **options)
        if left == 0 and asked["after"]:
            os.kill(os.getpid(), asked["how"])

    extraction.stoppable, draft.AtomicFile.publish = telling, counted


def hang(kind, what, number):
    """Let each part (of each upload) or shard of a site from the so-manieth on wait until the process is killed."""
    send, upload, shards = kind._send, kind.upload, itertools.count(1)

    def wait():
        threading.Event().wait()

    def send_parts(of, whole, key, file, alive):
        parts = itertools.count(1)
        return send(of, whole, key, file, lambda: wait() if next(parts) >= number else alive())

    def send_shard(of, key, *rest, **how):
        if key.count(".") == 3 and next(shards) >= number:
            wait()
        return upload(of, key, *rest, **how)

    if what == "part":
        kind._send = send_parts
    else:
        kind.upload = send_shard


def stopped(pid):
    """Wait for a process to be stopped by a signal; gives its number."""

    def state():
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    wait_for(lambda: state() in "TZ", HANGING)
    assert state() == "T", "it came to its end"
    return pid


class Runner:
    """Runs jobs in forks of one process."""

    def __init__(self, folder):
        import small_models as small  # noqa: PLC0415 -- it needs transformers

        small.llama().save_pretrained(folder / "model")
        small.byte_tokenizer().save_pretrained(folder / "model")
        lines = [{"text": f"document {number}: " + "some text, " * (number * 7 % 13)} for number in range(36)]
        (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
        self.folder, self.errors = folder, folder / "errors"
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self._answers = selectors.DefaultSelector()
        self._answers.register(self._process.stdout, selectors.EVENT_READ)

    def close(self):
        self._answers.close()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, **asked):
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        if not self._answers.select(HANGING):
            self._process.kill()
            pytest.fail(f"no answer in {HANGING} s: {self.errors.read_text()}")
        return int(self._process.stdout.readline())

    def start(self, path, *options, writes=0, after=False, how=signal.SIGKILL, hang=None):
        """Start a job; 0 is no limit to its writes, after which (or before the last of which) it gets a signal."""
        self.errors.write_text("")
        arguments = [
            "extract", str(self.folder / "model"), str(self.folder / "corpus.jsonl"), "--out", str(path),
            "--context-length", "24", "--batch-size", "3", "--shard-tokens", "64", *options,
        ]  # fmt: skip
        return self.start_job(arguments, writes=writes, after=after, how=how, hang=hang)

    def start_job(self, arguments, *, writes=0, after=False, how=signal.SIGKILL, hang=None):
        """Start any job, as `start`; some uploads hang (see there)."""
        return self._ask(start=arguments, errors=str(self.errors), writes=writes, after=after, how=int(how), hang=hang)

    def start_stopped(self, path, *options, writes):
        """Start a job that stops before its so-manieth write, in the middle of it; returns when it has."""
        return stopped(self.start(path, *options, writes=writes, how=signal.SIGSTOP))

    def wait(self, pid):
        return self._ask(wait=pid)

    def run(self, path, *options, **how):
        return self.wait(self.start(path, *options, **how))

    def killed(self, path, number, delay):
        """Run a job and send it a signal; give its exit code and how long it lived on."""
        pid = self.start(path)
        time.sleep(delay)
        began = time.monotonic()
        os.kill(pid, number)
        return self.wait(pid), time.monotonic() - began


if __name__ == "__main__":
    serve()
    sys.exit()
