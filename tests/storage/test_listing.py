"""Which shards are there, read off the names in a folder: strictly, and in memory that no root can make large."""

import json
import shutil
import tempfile
import tracemalloc
from itertools import product
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

import mmcache
from mmcache.format.manifest import Manifest
from mmcache.read.describe import overview
from mmcache.read.store import Store
from mmcache.storage.listing import count_shards, in_order, is_there, listed_shards, present_shards
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system import files
from stores_and_processes import python, widened

# Files in the suite, and with --slow.
MANY = (20_000, 4_000_000)

NUMBERS = (
    "0", "1", "2", "3", "4", "11", "00", "01", "+1", "-1", "1_0", " 1", "", "x", "\u0661", "9" * 18, "9" * 30,
)  # fmt: skip
BEFORE, BEHIND = ("", "", ".", "c.0.1.0", " "), ("", "", ".tmp", ".0", "\n", "\nc.0.1.0", " ")
NAMES = st.one_of(
    st.builds(
        lambda before, parts, behind: before + ".".join(["c", *parts]) + behind,
        st.sampled_from(BEFORE),
        st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4),
        st.sampled_from(BEHIND),
    ),
    st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=20),
)


def plan(layout, *, rows=7, layers=(0, 5, 9)):
    """Make a manifest whose site `x` has four blocks, and as many slots as its layout says."""
    return Manifest(
        kind="planned", store="s", layout=layout, dtype="float32", sites={"x": 1024}, layers=layers, n_tokens=rows,
        n_sequences=rows,
    ).with_geometry(2, rows)  # fmt: skip


@pytest.mark.parametrize("array", ["x", "tokens", "sequences"])
@pytest.mark.parametrize("layout", ["layer", "token"])
@pytest.mark.parametrize("at_a_time", [3, 1 << 14])
@given(names=st.sets(NAMES, max_size=25))
@example(names={f"c.{slot}.{block}.0" for slot, block in product(range(4), range(5))})
@example(names={"c.0", "c.1", "c.0.0", "c.1.0", "c.0.0.0", "c.01.0.0", "c.0.00.0"})
@example(names={"c.0.3.0\n", "c.0.3.0", "c.0.2.0x"})
def test_a_shard_is_there_if_and_only_if_its_very_name_is(layout, array, at_a_time, names):
    manifest, rows = plan(layout), 7 if array == "x" else 4 << 20
    names = {name for name in names if name not in (".", "..")}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_NAMES", at_a_time)
        path = Path(folder)
        (path / array).mkdir()
        for name in names:
            (path / array / name).touch()
        there = present_shards(path, manifest, array, rows)
        slots = 3 if layout == "layer" and array == "x" else 1
        own = list(product(range(slots), range(4)))
        keys = {shard: manifest.shard_key(array, shard[1], shard[0]) for shard in own}
        expected = [shard for shard in own if keys[shard] in names]
        assert there.shape == (slots, 4)
        assert list(in_order(there)) == expected
        assert list(in_order(~there)) == [shard for shard in own if shard not in expected]
        assert count_shards(path, manifest, array, rows) == len(expected)
        assert all(is_there(path, manifest, array, *shard) == (shard in expected) for shard in own)
        surplus = listed_shards(path, manifest, array, rows, expected=False)
        found = {manifest.shard_key(array, block, slot) for some in surplus for slot, block in zip(*some, strict=True)}
        assert found == {name for name in names if _is_a_key(name, array)} - set(keys.values())


def _is_a_key(name, array):
    """Tell whether some array could have a shard of this name: by writing every number anew."""
    first, *parts = name.split(".")
    wanted = {"x": 3, "sequences": 2, "tokens": 1}[array]
    numbers = [part for part in parts if part.isascii() and part.isdecimal() and len(part) <= 18]
    canonical = [part for part in numbers if str(int(part)) == part]
    return first == "c" and len(canonical) == len(parts) == wanted and (array == "tokens" or parts[-1] == "0")


def test_shards_are_named_in_order_over_all_pieces():
    which = np.random.default_rng(0).random((3, 150_000)) < 0.001
    assert list(in_order(which)) == [tuple(pair) for pair in np.argwhere(which).tolist()]
    assert all(type(number) is int for pair in in_order(which) for number in pair)


def test_a_folder_that_is_not_there_has_no_shards(tmp_path):
    manifest = plan("layer")
    assert not present_shards(tmp_path, manifest, "x", 7).any()
    (tmp_path / "x").touch()
    assert count_shards(tmp_path, manifest, "x", 7) == 0


def test_a_root_that_counts_more_shards_than_files_can_be_takes_no_memory_for_them(tmp_path):
    claimed = 2**48 - 1
    manifest = plan("layer", rows=claimed, layers=tuple(range(500)))
    (tmp_path / "x").mkdir()
    for name in ("c.0.0.0", "c.499.70368744177664.0", "c.500.0.0", f"c.0.{10**18 - 1}.0", "zarr.json"):
        (tmp_path / "x" / name).touch()
    (tmp_path / "zarr.json").write_bytes(manifest.to_json())
    store, shards = Store(tmp_path, manifest), 500 * 2**47
    tracemalloc.start()
    try:
        assert store.missing("x") == shards - 2
        said = overview(tmp_path)["sites"]["x"]
        folder = ShardFolder(tmp_path, manifest, "x", claimed)
        assert folder.count() == 2
        with pytest.raises(mmcache.IncompleteError, match=f"has 5 files, and {shards} shards are counted"):
            folder.present()
        with pytest.raises(mmcache.IncompleteError, match=f"{shards - 2} of {shards} shards of x are missing"):
            mmcache.open(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said["missing"] == shards - 2
    assert [at for at, part in enumerate(said["present"]) if part] == [0, 50]
    assert peak < 1 << 20


def test_what_files_back_is_believed_however_much_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcache.storage.shard_folder.MANY", 4)
    monkeypatch.setattr("mmcache.storage.shard_folder._SPARSE", 2)
    (tmp_path / "x").mkdir()
    folder = ShardFolder(tmp_path, plan("layer"), "x", 7)
    for files_there, believed in ((3, False), (4, True)):
        for block in range(files_there):
            (tmp_path / "x" / f"c.0.{block}.0").touch()
        if believed:
            assert folder.present().sum() == files_there
        else:
            with pytest.raises(mmcache.IncompleteError, match="has 3 files, and 12 shards are counted"):
                folder.present()


# Run in a process of its own, whose memory nothing else takes.
SCALE = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import mmcache
import mmcache.system.files
import mmcache.extraction.missing_shards
from mmcache.write.token_columns import Column, publish_columns
from mmcache.extraction.runner import ShardFiller
from mmcache.format.manifest import Manifest, array_json, read_manifest
from mmcache.system.launcher import Rank
from mmcache.extraction.estimate import survey_plan
from mmcache.extraction.runner import Batches

path, shards = Path(sys.argv[1]), int(sys.argv[2])
manifest = Manifest(
    kind="planned", store="many", layout="token", dtype="float32", sites={"x": 1024}, layers=(0,), n_tokens=shards,
    n_sequences=shards // 500,
).with_geometry(1, shards)
columns = {array: Column(path, manifest, array, 0) for array in ("tokens", "flags", "sequences")}
starts = np.arange(0, shards, 500)
columns["tokens"].extend(np.arange(shards) % 50_000)
columns["flags"].extend(np.arange(shards) % 500 == 0)
columns["sequences"].extend(np.stack([starts, starts + 500, starts // 5000], axis=1))
for column in columns.values():
    publish_columns(path, [column])
(path / "x").mkdir()
(path / "x" / "zarr.json").write_bytes(array_json(manifest, "x", shards))
(path / "zarr.json").write_bytes(manifest.to_json())
del columns, column, starts
# Behind all that is made durable, which would take them along.
for block in range(shards):
    (path / "x" / f"c.0.{block}.0").touch()
# As small a part of the names at a time as of four millions of them.
mmcache.system.files._NAMES = max(1, mmcache.system.files._NAMES * shards // 4_000_000)
# There is more to do than this disk has room for.
mmcache.extraction.missing_shards.free_bytes = lambda _: 1 << 60
# Imported only when it is used.
_ = mmcache.ActivationDataset


def memory(what):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024


def measured(name, work):
    # Makes the most memory so far what there is now.
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.perf_counter()
    found = work()
    took[name] = [time.perf_counter() - began, memory("VmHWM") - before]
    return found


def planned(manifest):
    batches = Batches(path, manifest, 8)
    fill = ShardFiller(path, manifest, batches, None, None, strict=False, rank=Rank())
    return survey_plan(path, manifest, fill, 8)


took = {}
store = measured("open", lambda: mmcache.open(path))
(path / "x" / f"c.0.{shards - 1}.0").unlink()
(path / "x" / "c.0.7.0").unlink()
# A second site of which nothing is there.
both = replace(manifest, sites={"x": 1024, "y": 1024}).with_geometry(1, shards)
one, two = measured("resume", lambda: planned(manifest)), measured("begin", lambda: planned(both))
data = measured("dataset", lambda: mmcache.ActivationDataset(store, batch_size=64))
print(json.dumps({
    "took": took,
    "to do": [one.shards_to_do, one.tokens_to_do, two.shards_to_do, two.tokens_to_do],
    "bytes": [one.bytes_to_do * shards, two.bytes_to_do * 2],
    "state": len(json.dumps(data.state_dict())),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc tells how much memory was needed")
def test_millions_of_shards_take_bytes_each_and_seconds_in_all(tmp_path, request):
    shards = widened(request, MANY)
    done = python(SCALE, tmp_path, shards, timeout=600)
    # pytest would keep them.
    shutil.rmtree(tmp_path / "x")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["to do"] == [2, 2, shards + 2, shards]
    assert said["bytes"][0] * (shards + 2) == said["bytes"][1] * shards
    assert said["state"] < 1000
    for what, (seconds, memory) in said["took"].items():
        assert memory < (2 << 20) + 24 * shards, (what, memory)
        assert seconds < 10, what
