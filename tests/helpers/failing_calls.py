"""A call of the system that fails once, in whichever thread makes it: for what is tried again behind it."""

import errno
import os
import threading

# The calls by which files are made, filled, made durable, named, read and removed.
CALLS = (
    "open", "pwrite", "pwritev", "preadv", "ftruncate", "fchmod", "fsync", "rename", "replace", "link", "unlink",
    "mkdir", "rmdir", "posix_fallocate",
)  # fmt: skip
NUMBERS = {"open": errno.EMFILE, "fsync": errno.EIO, "unlink": errno.EIO, "preadv": errno.EIO, "rmdir": errno.EIO}
KINDS = ("refused", "interrupt", "interrupt behind", "memory")


class FailOnce:
    """Stands in for `os` while it is entered: call number `at` goes wrong as `kind` says, all others as they would.

    `met` is the call and the thread's name, `count` how many calls there were; `at` None lets all of them pass.
    """

    def __init__(self, at, kind):
        self.at, self.kind, self.count, self.met = at, kind, 0, None
        self._lock = threading.Lock()
        self._real = {name: getattr(os, name) for name in CALLS if hasattr(os, name)}

    def __enter__(self):
        for name, real in self._real.items():
            setattr(os, name, self._counted(name, real))
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)

    def _counted(self, name, real):
        def call(*args, **options):
            with self._lock:
                fails = self.count == self.at
                self.count += 1
            if not fails:
                return real(*args, **options)
            self.met = name, threading.current_thread().name
            if self.kind == "refused":
                number = NUMBERS.get(name, errno.ENOSPC)
                raise OSError(number, os.strerror(number))
            if self.kind == "memory":
                raise MemoryError
            if self.kind == "interrupt behind":
                done = real(*args, **options)
                if name == "open":
                    os.close(done)
            raise KeyboardInterrupt

        return call

    @property
    def in_background(self):
        """Whether it was met in a thread of ours rather than the caller's."""
        return self.met is not None and self.met[1].startswith("mmcache-")
