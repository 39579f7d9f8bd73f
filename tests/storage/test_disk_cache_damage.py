"""Whatever befalls a copy in the cache, no row is wrong, no good object is blamed, and the copy comes again."""

import contextlib
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import mmcache
from damaged_stores import MAKERS
from mmcache.format.shard import HEADER_BYTES
from mmcache.storage import disk_cache, mirror
from mmcache.storage.disk_cache import DiskCache, identity
from mmcache.system.atomic import AtomicFile
from stores_and_processes import same, widened, without_sync

KINDS = ("planned, token", "grown, layer", "cache")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)


class Far:
    """A store in a bucket that is a folder, its local twin, and a cache."""

    def __init__(self, folder, kind):
        self.right, self.cache = folder / "acts", folder / "cache"
        MAKERS[kind](self.right).close()
        self.url = f"file://{folder}/bucket"
        mmcache.push(self.right, self.url)
        with mmcache.open(self.right) as store:
            self.rows = {site: store[site].gather(range(store.n_tokens)) for site in store.sites}

    def open(self, **options):
        return mmcache.open(self.url, cache_dir=self.cache, **options)

    def compare(self, found):
        """Read all that there is of the store, some of it in each way, and compare it with the twin."""
        with mmcache.open(self.right) as right:
            for site, rows in self.rows.items():
                assert same(found[site].gather(range(right.n_tokens)), rows)
                assert same(found[site].get_position(found.layers[-1], 3), rows[3, -1])
                assert same(found[site].statistics.mean, right[site].statistics.mean)
            assert same(found.tokens, right.tokens)
            assert same(found.flags, right.flags)
            assert [*found.sequences] == [*right.sequences]
            assert found.tokenizer_json() == right.tokenizer_json()

    def bring(self, **options):
        """Bring all of it, and read it."""
        with self.open(**options) as found:
            for site in found.sites:
                found[site].read_ahead(0, found.n_tokens)
            self.compare(found)

    def copies(self):
        """List what is in the cache: shards and parts of some, metadata, and what is noted of them."""
        return sorted(file for file in self.cache.rglob("*") if file.is_file() and file.name != ".gone")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        far = Far(tmp_path_factory.mktemp("far"), request.param)
        far.bring()
    return far


@pytest.fixture
def far(made, tmp_path):
    """A store in a bucket with a cache of its own, in which all of it is."""
    found = Far.__new__(Far)
    vars(found).update(vars(made), cache=tmp_path / "cache")
    found.bring()
    return found


def write(file, data, times=None):
    """Put other bytes into a file, and set its times back if they are given."""
    file.chmod(0o644)
    with file.open("r+b") as opened:
        opened.write(data)
        opened.truncate()
    if times is not None:
        os.utime(file, ns=times)
    file.chmod(0o444)


def instead(file, make):
    file.unlink()
    make(file)


def flip(data, dice, start=0, stop=None):
    """Flip one bit; most of the bytes are rows, so that half of the bits are in what stands around them."""
    at = dice.randrange(start, len(data) if stop is None else stop)
    if dice.random() < 0.5:
        at = dice.choice([at % HEADER_BYTES % len(data), len(data) - 1 - at % 2000 % len(data)])
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]


# What may befall a file: of its bytes and the dice, the bytes that it has then.
CHANGES = {
    "flip": flip,
    "zeros": lambda data, _: bytes(len(data)),
    "half zeros": lambda data, _: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "cut": lambda data, dice: data[: dice.randrange(len(data))],
    "empty": lambda _data, _dice: b"",
    "longer": lambda data, dice: data + dice.randbytes(dice.choice([1, 8, 4096])),
    "random": lambda data, dice: dice.randbytes(len(data)),
}
# What may befall it as a file, told of another one.
ACTS = {
    "removed": lambda file, _: file.unlink(),
    "another's bytes": lambda file, other: write(file, other.read_bytes()),
    "another": lambda file, other: instead(file, partial(shutil.copy2, other)),
    "a link": lambda file, other: instead(file, lambda there: there.symlink_to(other)),
    "a link to nothing": lambda file, _: instead(file, lambda there: there.symlink_to("nothing")),
    "a link to itself": lambda file, _: instead(file, lambda there: there.symlink_to(there)),
    "a pipe": lambda file, _: instead(file, os.mkfifo),
    "no right": lambda file, _: file.chmod(0),
    "new times": lambda file, _: os.utime(file),
}


def damage(far, dice):
    """Let something befall one file of the cache; say what."""
    files = far.copies()
    file, other = dice.choice(files), dice.choice(files)
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns) if dice.random() < 0.5 else None
    what = dice.choice([*CHANGES, *ACTS])
    data = file.read_bytes()
    if what in ACTS:
        if other != file:
            ACTS[what](file, other)
    elif data:
        write(file, CHANGES[what](data, dice), times)
    return what, file.relative_to(far.cache)


@pytest.mark.parametrize("check", [False, True])
def test_whatever_befalls_the_cache_all_that_is_read_is_right(far, check, request):
    dice = random.Random(f"{check}")  # noqa: S311 -- to damage files
    for turn in range(widened(request, (8, 300))):
        befell = [damage(far, dice) for _ in range(dice.choice([1, 1, 3]))]
        try:
            far.bring(check=check)
        except BaseException as error:
            raise AssertionError(f"turn {turn}: {befell}") from error


def test_parts_of_shards_are_compared_too(tmp_path, request):
    far, dice = Far(tmp_path, "grown, layer"), random.Random(0)  # noqa: S311 -- as above
    small = {"cache_bytes": 1 << 16}
    for turn in range(widened(request, (12, 600))):
        with far.open(**small) as found:
            assert not found.fits
            for start in (10, 300):
                found["a"].read_ahead(start, start + 90)
                rows = range(start, start + 90)
                assert same(found["a"].gather(rows), far.rows["a"][start : start + 90])
        if turn == 0:
            parts = [file for file in (far.cache / "shards").iterdir() if file.stat().st_size == 90 * 32 + 4]
            assert len(parts) == 4, "two layers, two stretches"
        damage(far, dice)


def test_a_part_under_the_name_of_another_is_fetched_again(tmp_path):
    far, small = Far(tmp_path, "grown, layer"), {"cache_bytes": 1 << 16}
    for turn in range(2):
        with far.open(**small) as found:
            for start in (10, 300):
                found["a"].read_ahead(start, start + 90)
                assert same(found["a"].gather(range(start, start + 90)), far.rows["a"][start : start + 90]), turn
        parts = [file for file in (far.cache / "shards").iterdir() if file.stat().st_size == 90 * 32 + 4]
        assert len(parts) == 4, "two layers, two stretches"
        for part, data in zip(
            parts, [parts[-1].read_bytes(), *(part.read_bytes() for part in parts[:-1])], strict=True
        ):
            write(part, data)


# What somebody does to the cache while the store is open.
MEANWHILE = {
    "a bit flips": lambda file: write(file, flip(file.read_bytes(), random.Random(1), HEADER_BYTES)),  # noqa: S311
    "they are cut short": lambda file: write(file, file.read_bytes()[:5000]),
    "they become longer": lambda file: write(file, file.read_bytes() + b"more"),
    "they go": lambda file: file.unlink(),
    "others come": lambda file: instead(file, lambda there: there.write_bytes(bytes(9000))),
    "they are touched": os.utime,
}


@pytest.mark.parametrize(
    "made", ["grown, layer", pytest.param("planned, token", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("what", MEANWHILE)
def test_what_is_done_to_copies_that_are_mapped_is_noticed(far, what, check):
    with far.open(check=check) as found:
        far.compare(found)
        for file in far.copies():
            if file.parent.name == "shards":
                MEANWHILE[what](file)
        # No part of what was kept in memory.
        for site, rows in far.rows.items():
            assert same(found[site].gather(range(found.n_tokens)), rows)
            assert same(found[site].get_layer(found.layers[0]), rows[:, 0])
    far.bring(check=check)


@pytest.mark.parametrize("made", ["grown, layer"], indirect=True)
def test_a_copy_is_compared_once_after_a_restart_by_whichever_process(far, monkeypatch):
    copies, compared, real = {file.name for file in far.copies() if file.parent.name == "shards"}, [], mirror.check_copy
    monkeypatch.setattr(mirror, "check_copy", lambda file, check: (compared.append(file.name), real(file, check))[1])
    far.bring()
    assert compared == [], "what was just fetched was compared on its way"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(disk_cache, "_boot", lambda: "another one")
        far.bring()
        assert sorted(compared) == sorted(copies)
        far.bring()
        assert len(compared) == len(copies)
    # Of several machines that share a cache, each knows what it has compared.
    far.bring()
    assert len(compared) == len(copies)
    # Where the system does not say when it was started, each process compares them.
    monkeypatch.setattr(disk_cache, "_boot", lambda: "")
    far.bring()
    far.bring()
    assert sorted(compared) == sorted([*copies] * 3)


@pytest.mark.parametrize("made", ["grown, layer"], indirect=True)
def test_what_the_power_took_is_found_after_the_restart(far, monkeypatch):
    files = [file for file in far.copies() if file.parent.name == "shards"]
    for file in files:
        write(file, bytes(file.stat().st_size))
    # As if nobody had written to them.
    for cache in {file.parent for file in files}:
        for file in files:
            DiskCache(cache, 1 << 30)._records.note(file.name, identity(file))
    monkeypatch.setattr(disk_cache, "_boot", lambda: "after the power came back")
    far.bring()


@pytest.mark.parametrize("made", ["grown, layer"], indirect=True)
def test_many_who_find_the_same_damage_fetch_it_once_and_none_is_told(far):
    for file in far.copies():
        if file.parent.name == "shards":
            write(file, flip(file.read_bytes(), random.Random(2), HEADER_BYTES))  # noqa: S311 -- as above
    ready = threading.Barrier(6)

    def work(number):
        with far.open(check=number % 2 > 0) as found:
            ready.wait()
            far.compare(found)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


@pytest.mark.parametrize("made", ["planned, token"], indirect=True)
def test_metadata_that_is_damaged_before_it_is_read_comes_again_and_is_blamed_only_if_it_is_damaged_there(far):
    with far.open() as found:
        for file in far.copies():
            if "stores" in file.parts and file.name != ".tags.json" and file.stat().st_size:
                write(file, flip(file.read_bytes(), random.Random(3)))  # noqa: S311 -- as above
        far.compare(found)
    there = far.right.parent / "bucket" / "tokenizer" / "tokenizer.json"
    good = there.read_bytes()
    write(there, good.replace(b"a", b"b", 1))
    try:
        with far.open() as found, pytest.raises(mmcache.CorruptError, match=f"{far.url}/tokenizer/tokenizer.json"):
            found.tokenizer_json()
    finally:
        write(there, good)
    far.bring()


def objects(far):
    folder = far.right.parent / "bucket"
    return {key: folder / key for key in ("a/c.0.0.0", "a/c.1.0.0") if (folder / key).exists()}


@pytest.mark.parametrize("check", [False, True])
def test_an_object_is_blamed_when_what_just_came_is_damaged_and_no_longer(tmp_path, check):
    far = Far(tmp_path, "grown, layer")
    for file in objects(far).values():
        good = file.read_bytes()
        shutil.rmtree(far.cache, ignore_errors=True)
        file.write_bytes(good[:5000] + bytes([good[5000] ^ 4]) + good[5001:])
        for _ in range(2):
            with pytest.raises(mmcache.CorruptError, match=f"{far.url}/a/{file.name}: .*match") as told:
                far.bring(check=check)
            assert str(far.cache) not in str(told.value)
        file.write_bytes(good)
        far.bring(check=check)


def test_a_disk_that_spoils_what_is_written_is_blamed_itself(tmp_path, monkeypatch):
    far, real = Far(tmp_path, "grown, layer"), AtomicFile.publish

    def publish(draft, size, *, durable=True):
        real(draft, size, durable=durable)
        if draft.path.parent.name == "shards":
            data = draft.path.read_bytes()
            write(draft.path, data[:4500] + bytes([data[4500] ^ 1]) + data[4501:])

    monkeypatch.setattr(AtomicFile, "publish", publish)
    with far.open(check=True) as found, pytest.raises(mmcache.CorruptError, match=r"memory fails.*cache_dir") as told:
        _ = found.tokens
    assert str(far.cache) in str(told.value)


@pytest.mark.parametrize("folder", ["stores", "shards"])
def test_a_link_in_the_cache_is_not_followed(tmp_path, folder):
    far = Far(tmp_path, "planned, token")
    far.bring()
    mine = tmp_path / "mine"
    shutil.copytree(far.right, mine)
    before = {file: (identity(file), file.read_bytes()) for file in mine.rglob("*") if file.is_file()}
    for path in sorted((far.cache / folder).rglob("*"), reverse=True):
        if path.is_dir() and path.parent.name != "stores" and path.name != ".checked":
            shutil.rmtree(path)
            path.symlink_to(mine / "mlp_in")
        elif path.is_file() and path.name != ".gone":
            path.unlink()
            path.symlink_to(mine / "mlp_in" / "c.0.0.0")
    with contextlib.suppress(mmcache.MmcacheError):
        far.bring()
    assert {file: (identity(file), file.read_bytes()) for file in mine.rglob("*") if file.is_file()} == before
    far.bring()
