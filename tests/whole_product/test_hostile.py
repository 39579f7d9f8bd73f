"""A store from a stranger: whatever its files say, a reader answers or raises our errors, soon, in little memory.

Attacks that are tried, alone and together, on the root's `zarr.json` (with a digest that fits: the attacker can sign),
on arrays' `zarr.json`, on merged statistics, and on the headers of shards:

- numbers that are negative, huge (to 2**64 and beyond), fractions, NaN, booleans, texts, null, lists, objects;
- counts of tokens, sequences and layers that the files do not have; shards and chunks that divide nothing, or are one
  row; offsets that overlap, point outside or overflow; shapes whose product overflows;
- fields that are missing, doubled, unknown, or of another place; layers that are doubled, unsorted or without end;
- names of sites that lead out of the folder, are empty, reserved, unprintable, or endless; two names of one folder;
- JSON that is nested deeply, cut short, followed by more, not UTF-8, full of NUL, or of megabytes;
- a header whose length is a lie; bytes flipped, cut out, doubled and exchanged;
- pipes, folders and symbolic links in the place of files (`ops/test_verify.py`).

Nothing of a store is ever unpickled or evaluated.
"""

import copy
import hashlib
import json
import random
import shutil
import time
from pathlib import Path

import pytest

import mmcache
from damaged_stores import MAKERS
from mmcache.view import (
    apart,
    dimension,
    dimensions,
    find,
    health,
    json_ready,
    norms,
    overview,
    sequence,
    statistics_view,
    token,
    top,
)
from stores_and_processes import widened

# Of each kind of store: in the suite, and with --slow, where all kinds together make 50,000.
MUTANTS = (60, 10_000)
# Seconds that a reader may take, and bytes that it may take beyond the first ones.
LONGEST, MOST = 1.0, 200 << 20

# What the terminal, notebooks and the page are drawn from.
LOOKS = (
    lambda store, site: norms(store, site).to_json(),
    lambda store, site: norms(store, site, stop=16).to_json(),
    lambda store, site: health(store, site).to_json(),
    lambda store, site: apart(store, site).to_json(),
    lambda store, site: dimensions(store, site).to_json(),
    lambda store, site: dimension(store, site, store.layers[0], 0).to_json(),
    lambda store, site: sequence(store, site, store.layers[0], 0).to_json(),
    lambda store, site: token(store, site, 0).to_json(),
    lambda store, site: top(store, site, store.layers[0], 0).to_json(),
)
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 4096, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**47, 2**48 - 1, 2**48, 2**53, 2**63 - 1,
    2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.5, 1e308, float("inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", "a", ".", "..", "/", "/etc/passwd", "../../x", "a/b", "a\\b", "\0", "\u202e", "é" * 300, "x" * 5000, "tokens",
    "zarr.json", "statistics", ".lock", "__a", "bfloat16", "int8", "object", "planned", "grown", "layer", "token",
    "null", "cos\nsystem\n(S'x'\ntR.", "{{7*7}}", "%s%n",
)  # fmt: skip


def deep(levels):
    """Nest a list."""
    found = []
    for _ in range(levels):
        found = [found]
    return found


def anything(dice):
    """Choose any value that JSON has."""
    kind = dice.randrange(8)
    if kind < 3:
        return dice.choice(NUMBERS)
    if kind < 5:
        return dice.choice(TEXTS)
    plain = (None, True, False, [], {}, [0], [0, 0], [1, 0], list(range(50)), {"a": 1}, {"": {}}, [None], deep(60))
    return copy.deepcopy(dice.choice(plain))


def places(node, found=None):
    """List every (container, key) of a JSON value."""
    found = [] if found is None else found
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        found.append((node, key))
        places(node[key], found)
    return found


def mutate(value, dice):
    """Change a JSON value in up to three places."""
    value = copy.deepcopy(value)
    for _ in range(dice.randrange(1, 4)):
        every = places(value)
        if not every:
            return anything(dice)
        node, key = dice.choice(every)
        how = dice.randrange(6)
        if how < 3:
            node[key] = anything(dice)
        elif how == 3 and isinstance(node[key], int | float):
            node[key] = (
                node[key] + dice.choice((-1, 1, 7))
                if dice.random() < 0.5
                else node[key] * dice.choice((-1, 2, 1 << 20))
            )
        elif how == 4:
            del node[key]
        elif isinstance(node, dict):
            node[dice.choice(TEXTS) or "x"] = copy.deepcopy(node[key])
        else:
            node.insert(0, copy.deepcopy(node[key]))
    return value


def signed(value):
    """Write JSON with a digest that fits, where it has a place for one."""
    try:
        value["attributes"]["mmcache"]["digest"] = "0" * 64
    except (TypeError, KeyError, IndexError):
        return json.dumps(value).encode()
    text = json.dumps(value).encode()
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)


def scrambled(data, dice):
    """Change bytes, without a thought for what they mean."""
    at, size = dice.randrange(len(data) + 1), dice.choice((1, 2, 8, 64, 1000))
    ways = (
        lambda: data[:at] + dice.randbytes(size) + data[at + size :],
        lambda: data[:at] + data[at + size :],
        lambda: data[:at] + data[at : at + size] * 2 + data[at + size :],
        lambda: data[:at],
        lambda: data + dice.choice((b"\0", b"{}", b" ", b"\xff\xfe", data)),
        lambda: b"[" * dice.choice((50, 5000, 200_000)) + data,
        lambda: data[:at] + dice.choice((b"\0", b"\xc3\x28", b'"', b"}", b"\\u0000", b"1e999")) + data[at:],
    )
    return dice.choice(ways)()


def mutant_of(file, data, dice):
    """Give what a stranger may have put into a file."""
    if dice.random() < 0.25:
        return scrambled(data, dice)
    if file.name == "zarr.json":
        return signed(mutate(json.loads(data), dice))
    if data[8:9] != b"{":
        return scrambled(data, dice)
    # A shard: its header, at its length or another.
    text = json.dumps(mutate(json.loads(data[8:4096]), dice), separators=(",", ":")).encode()
    length = dice.choice((4088, 4088, 4088, 0, 1, len(text), 2**31, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + text.ljust(4088)[:4088] + data[4096:]


def read_everything(path, works=None):
    """Do what readers do; only our own errors may come."""
    for work in works or (_look, _verify, _train, _cache):
        try:
            work(path)
        except mmcache.MmcacheError:
            continue


def _verify(path):
    mmcache.verify(path, "quick")
    mmcache.verify(path)


def _look(path):
    store = mmcache.open(path, partial=True)
    json.dumps(json_ready(overview(store.path)))
    for ask in (
        lambda: store.tokens,
        lambda: store.sequences,
        lambda: store.locate(store.n_tokens - 1),
        *(lambda site=site: store[site].get_position(store.layers[-1], -1) for site in store.sites),
        *(lambda site=site: store[site].gather([0, store.n_tokens - 1, 0]) for site in store.sites),
        *(lambda site=site: statistics_view(store, site) for site in store.sites),
        *(lambda site=site, view=view: view(store, site) for site in store.sites for view in LOOKS),
        lambda: find(store, token=3).to_json(),
        lambda: find(store, "a").to_json(),
    ):
        try:
            ask()
        except (mmcache.MmcacheError, IndexError):
            continue
    store.close()


def _train(path):
    store = mmcache.open(path, partial=True)
    if store.n_tokens < 10_000:
        next(iter(mmcache.ActivationDataset(store, batch_size=64, drop=())), None)


def _cache(path):
    cache = mmcache.FullActivationCache.open(path)
    cache.get_position(0, 0)


def replace(file, data):
    """Put another file there: who still reads the old one, as a feed's thread does, keeps it."""
    other = file.with_name(".other")
    other.write_bytes(data)
    other.replace(file)


def memory():
    """Give the most memory that this process ever had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "acts"
    MAKERS[request.param](path)
    return path


def test_what_a_stranger_wrote_is_read_or_refused(made, tmp_path, request):
    path = shutil.copytree(made, tmp_path / "copy")
    read_everything(path)
    before, slowest = memory(), (0.0, None)
    roots = [path / "zarr.json"] * 6
    files = [*path.rglob("zarr.json"), *path.rglob("c.*"), *(path / "statistics").rglob("0"), *roots]
    files += (path / "tokenizer").glob("*")
    files = [file for file in files if file.is_file()]
    dice = random.Random(7)  # noqa: S311
    for number in range(widened(request, MUTANTS)):
        file = dice.choice(files)
        data = file.read_bytes()
        new = mutant_of(file, data, dice)
        replace(file, new)
        began = time.monotonic()
        try:
            read_everything(path)
        except Exception as error:
            error.add_note(f"mutant {number}, {file.relative_to(path)}: {new[:2000]!r}")
            raise
        taken = time.monotonic() - began
        if taken > slowest[0]:
            slowest = taken, (number, str(file.relative_to(path)), new[:500])
        replace(file, data)
    # A machine that is busy otherwise takes its time, and a hang takes far more.
    assert slowest[0] < 4 * LONGEST, slowest
    assert memory() - before < MOST, (memory() - before) >> 20


@pytest.mark.parametrize("levels", [100, 10_000, 2_000_000])
def test_json_of_any_depth_is_refused(tmp_path, levels):
    (tmp_path / "zarr.json").write_bytes(b'{"attributes":' + b"[" * levels + b"]" * levels + b"}")
    with pytest.raises(mmcache.CorruptError):
        mmcache.open(tmp_path)


def test_a_root_that_counts_a_hundred_million_shards_takes_no_memory_for_them(tmp_path):
    path = tmp_path / "acts"
    MAKERS["grown, layer"](path)
    root = json.loads((path / "zarr.json").read_bytes())
    root["attributes"]["mmcache"]["n_tokens"] = 2**37
    replace(path / "zarr.json", signed(root))
    ways = (_look, mmcache.verify, _train, _cache)
    # What modules take, and a report of all that is wrong, they take once.
    read_everything(path, ways)
    before = memory()
    read_everything(path, ways)
    store = mmcache.open(path, partial=True)
    with pytest.raises(mmcache.IncompleteError):
        store["a"].get_position(0, -1)
    assert memory() - before < 50 << 20
