"""Stores, caches and staging folders full of links: nothing outside changes, not even a time, and nothing hangs.

Every file and folder in turn, and every name that a writer would make, is a link to a file, to a folder, to another
store, to itself or to nothing; a file also a second name of the user's file, or a pipe. Then each operation is tried.
The suite takes a sample; `--slow` takes all.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import warnings

import pytest
import torch

import mmcache
import small_models
from damaged_stores import TEXTS, cache, extracted, grown
from stores_and_processes import widened, without_sync

SECONDS = 60
SITES = ("mlp_in", "mlp_out")
JOB = {"context_length": 24, "batch_size": 3, "shard_tokens": 64}
# Names that writers make, or look for, whether they are there or not.
MADE = (".lock", ".set-aside", ".staging", "statistics", "tokenizer", "resid_post")
KINDS = ("a file", "a folder", "a store", "itself", "nothing", "second name", "pipe")


class HangsError(BaseException):
    """An operation that does not end."""


def _hangs(*_):
    raise HangsError


def rows(n):
    return {"a": torch.zeros(2, n, 8), "b": torch.zeros(2, n, 4)}


def read(path, **options):
    with mmcache.open(path, partial=True, **options) as store:
        _ = store.sequences, store.tokens, store.flags
        for site in store.sites:
            store[site].get_position(store.layers[0], 0)
            _ = store[site].statistics
        for _ in mmcache.ActivationDataset(store, batch_size=64):
            break


def append(path):
    with mmcache.append(path) as writer:
        writer.append(torch.arange(300) % 9, rows(300))


def create(path):
    with mmcache.create(path, sites={"a": 8, "b": 4}, n_layers=2, shard_tokens=256) as writer:
        writer.append(torch.arange(300) % 9, rows(300))


def fill(path):
    with mmcache.FullActivationCache.with_capacity(2, path=path, shard_tokens=256) as made:
        made.push(torch.randn(300, 16))
        made.flush()


def read_cache(path):
    made = mmcache.FullActivationCache.open(path)
    made.get_layer(0)
    made.close()


def extract(path, sites=SITES, texts=TEXTS, **options):
    model, tokenizer = small_models.llama(), small_models.byte_tokenizer()
    mmcache.extract(model, tokenizer, texts, path, sites=sites, **JOB, **options).close()


# Of each kind of store what is tried on it: the planted folder, and a folder for whatever else there is.
LOOKS = {
    "read": lambda path, _: read(path),
    "verify": lambda path, _: mmcache.verify(path),
    "repair": lambda path, _: mmcache.repair(path),
    "push": lambda path, out: mmcache.push(path, f"file://{out}/pushed"),
    "export": lambda path, out: mmcache.export(path, out / "exported", to="safetensors"),
}
ON = {
    "grown": LOOKS | {"append": lambda path, _: append(path), "create": lambda path, _: create(path)},
    "cache": LOOKS | {"read": lambda path, _: read_cache(path), "fill": lambda path, _: fill(path)},
    "empty": {
        "create": lambda path, _: create(path),
        "fill": lambda path, _: fill(path),
        "extract": lambda path, _: extract(path),
        "pull": lambda path, out: mmcache.pull(f"file://{out.parents[2]}/bucket", path),
    },
    "planned": LOOKS
    | {
        "resume": lambda path, _: extract(path),
        "add": lambda path, _: extract(path, (*SITES, "resid_post")),
        "pull": lambda path, out: mmcache.pull(f"file://{out.parents[2]}/bucket", path),
    },
    "begun": {"resume": lambda path, _: extract(path), "repair": LOOKS["repair"]},
    "short": {
        "grow": lambda path, _: extract(path, max_tokens=200),
        "resume": lambda path, _: extract(path, max_tokens=100),
    },
    "cached": {"read": lambda path, out: read(f"file://{out.parents[2]}/bucket", cache_dir=path)},
    "staged": {"send": lambda path, out: extract(f"file://{out}/sent", staging=path)},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every kind of folder, and a bucket."""
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        top = tmp_path_factory.mktemp("links")
        folder = top / "made"
        folder.mkdir()
        grown(folder / "grown").close()
        cache(folder / "cache").close()
        (folder / "empty").mkdir()
        extracted(folder / "planned").close()
        shutil.copytree(folder / "planned", folder / "begun")
        (folder / "begun" / "mlp_out" / "c.0.1.0").unlink()
        extract(folder / "short", max_tokens=100)
        mmcache.push(folder / "planned", f"file://{top}/bucket")
        read(f"file://{top}/bucket", cache_dir=folder / "cached")
        _staged(folder / "staged", top)
    return folder


def _staged(folder, top):
    """A staging folder as a job that was interrupted leaves it."""

    def progress(told):
        if told.phase == "extract" and told.tokens:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        extract(f"file://{top}/began", staging=folder, progress=progress)


def places(folder, kind):
    """Name all that is in a folder, and what writers would make there."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if kind == "cached":
        return sorted(
            found
            | {
                "shards/.gone",
                "shards/.room.lock",
                f"{min(f for f in found if f.count('/') == 1 and f[:6] == 'stores')}/.mirror.lock",
            }
        )
    if kind == "staged":
        return sorted(
            found | {".lock", ".staging/.lock", ".staging/.claims.lock", ".staging/url", ".staging/x.claims", *SITES}
        )
    if kind == "empty":
        return sorted({*MADE, "zarr.json", "a", "tokens", "flags", "sequences", *SITES})
    return sorted(found | set(MADE))


def plant(place, how, mine):
    """Put something in a place, whatever is there."""
    if place.is_dir() and not place.is_symlink():
        if how in ("second name", "pipe"):
            return False
        shutil.rmtree(place)
    elif os.path.lexists(place):
        place.unlink()
    place.parent.mkdir(parents=True, exist_ok=True)
    aims = {
        "a file": mine / "file",
        "a folder": mine / "folder",
        "a store": mine / "store",
        "itself": place.name,
        "nothing": mine / "none",
    }
    if how in aims:
        place.symlink_to(aims[how])
    elif how == "pipe":
        os.mkfifo(place)
    else:
        os.link(mine / "file", place)
    return True


def state(mine, *, renamed):
    """All that tells whether anything of the user's was touched.

    Whoever takes a second name away changes the time of the file's last change and its count of names: that is all.
    """
    found = {}
    for path in (mine, *sorted(mine.rglob("*"))):
        status = path.lstat()
        times = (status.st_mtime_ns, status.st_ctime_ns, status.st_nlink)
        if renamed and path.name == "file":
            times = times[:1]
        data = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
        found[str(path)] = (times, status.st_mode, status.st_size, data)
    return found


def cases(made):
    found = []
    for kind, operations in ON.items():
        for place in places(made / kind, kind):
            found += [(kind, place, how, operation) for how in KINDS for operation in operations]
    return found


def attempt(made, folder, case):
    """Try an operation; what is wrong with how it went, or None, and how it ended."""
    kind, place, how, operation = case
    folder.mkdir()
    path, mine, out = folder / "acts", folder / "mine", folder / "out"
    shutil.copytree(made / kind, path, symlinks=True)
    if kind == "staged":
        (path / ".staging").mkdir(exist_ok=True)
        (path / ".staging" / "url").write_text(f"file://{out}/sent\n")
    for name in (mine, out, mine / "folder"):
        name.mkdir()
    (mine / "file").write_text("precious")
    (mine / "folder" / "c.0.0.0").write_text("precious too")
    shutil.copytree(made / "grown", mine / "store")
    if not plant(path / place, how, mine):
        return None, "none"
    # Who only reads a store takes no name away; a cache replaces its copies.
    reads = kind != "cached" and operation in ("read", "verify", "push", "export")
    renamed = how == "second name" and not reads
    before = state(mine, renamed=renamed)
    signal.alarm(SECONDS)
    try:
        ON[kind][operation](path, out)
        ended = "returned"
    except mmcache.MmcacheError as error:
        ended = type(error).__name__
    except HangsError:
        return f"{case} hangs", "hangs"
    except Exception as error:  # noqa: BLE001 -- whatever is not ours is a finding
        return f"{case}: raw {type(error).__name__}: {error}", "raw"
    finally:
        signal.alarm(0)
    after = state(mine, renamed=renamed)
    if after != before:
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        return f"{case} ({ended}) changed {changed}", ended
    return None, ended


def test_nothing_outside_changes(made, tmp_path, monkeypatch, request, record_property):
    without_sync(monkeypatch)
    monkeypatch.setenv("MMCACHE_CACHE", str(tmp_path / "elsewhere"))
    warnings.simplefilter("ignore")
    top = made.parent
    every = cases(made)
    random.Random(0).shuffle(every)  # noqa: S311
    before = signal.signal(signal.SIGALRM, _hangs)
    wrong, ends = [], {}
    work = top / "work"
    work.mkdir(exist_ok=True)
    try:
        for number, case in enumerate(every[: widened(request, (60, 2500))]):
            problem, ended = attempt(made, work / str(number), case)
            shutil.rmtree(work / str(number))
            ends[ended] = ends.get(ended, 0) + 1
            wrong += [problem] if problem else []
    finally:
        signal.signal(signal.SIGALRM, before)
    record_property("ends", ends)
    assert not wrong, f"{len(wrong)} of {sum(ends.values())}:\n" + "\n".join(wrong[:400])
