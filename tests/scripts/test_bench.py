"""The benchmark: its arithmetic, its care for what is cold, and its structure from one tiny run; never its speed."""

import importlib
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmcache

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def parts():
    """Give the modules of the benchmark by name."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("measure", "cold", "floors", "growth", "limits", "plot", "machine")
        yield {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    finally:
        sys.path.remove(str(SCRIPTS))


def plain_disk(folder):
    """Whether files there can be read directly, and be out of the page cache."""
    (folder / "probe").write_bytes(bytes(4096))
    try:
        os.close(os.open(folder / "probe", os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(point), kind) for _, point, kind, *_ in mounts if folder.resolve().is_relative_to(point)]
    return max(inside)[1] not in {"tmpfs", "ramfs"}


times = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=7)


@given(data=st.data(), unit=st.sampled_from(["GB/s", "tokens/s", "share", "us", "ms", "s", "%"]))
def test_a_ratio_is_above_one_where_we_are_better(parts, data, unit):
    compare = parts["measure"].compare
    ours = data.draw(times)
    theirs = data.draw(st.lists(st.floats(1e-6, 1e6), min_size=len(ours), max_size=len(ours)))
    row = compare("name", "what", "beside", unit, ours, theirs)
    rate = unit.endswith("/s") or unit == "share"
    ratios = sorted(a / b if rate else b / a for a, b in zip(ours, theirs, strict=True))
    assert row.ratio == np.median(ratios)
    assert (row.ours, row.theirs) == (np.median(ours), np.median(theirs))
    assert 0 <= row.spread <= ratios[-1] - ratios[0]
    assert row.met is None
    assert compare("n", "w", "b", unit, ours, theirs, goal=row.ratio).met
    assert not compare("n", "w", "b", unit, ours, theirs, goal=row.ratio * 1.01).met
    assert compare("n", "w", "b", unit, ours, theirs, limit=row.ours).met
    assert not compare("n", "w", "b", unit, ours, theirs, limit=row.ours * (1.01 if rate else 0.99)).met


def test_sides_are_measured_in_turn(parts):
    seen = []

    def side(name):
        def work():
            seen.append(name)
            return float(len(seen))

        return work

    found = parts["measure"].in_turn({"a": side("a"), "b": side("b")}, 3)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_floors_are_met_missed_and_kept(parts, tmp_path):
    compare, floors, path = parts["measure"].compare, parts["floors"], tmp_path / "floors.json"

    def row(name, ratios):
        return compare(name, "what", "beside", "GB/s", ratios, [1.0] * len(ratios))

    floors.record(path, "quick", [row("a", [0.9, 1.0, 1.1]), row("b", [2.0, 2.0, 2.0]), row("once", [5.0])])
    floors.record(path, "full", [row("a", [3.0, 3.0])])
    assert json.loads(path.read_text()) == {"full": {"a": 3.0}, "quick": {"a": 0.9, "b": 2.0}}
    assert floors.check(path, "quick", [row("a", [0.9, 0.9]), row("b", [2.0, 2.0]), row("new", [0.0, 0.0])]) == []
    # Below, but not by more than its spread.
    assert floors.check(path, "quick", [row("b", [1.0, 1.9, 2.1])]) == []
    (said,) = floors.check(path, "quick", [row("a", [1.0, 1.0]), row("b", [1.5, 1.5])])
    assert said.startswith("slower: b is 1.5")
    floors.record(path, "quick", [row("b", [1.0, 1.0])])
    assert json.loads(path.read_text())["quick"] == {"a": 0.9, "b": 1.0}


def test_what_is_mapped_is_not_cold_and_is_not_called_so(parts, tmp_path, monkeypatch):
    if not plain_disk(tmp_path):
        pytest.skip("this folder's files are never out of memory")
    cold, path = parts["cold"], tmp_path / "file"
    monkeypatch.setattr(cold, "_DROP", tmp_path / "nobody may")
    path.write_bytes(bytes(1 << 20))
    cold.make_cold([path])
    assert cold.resident_bytes(path) == 0
    cold.make_warm([path])
    assert cold.resident_bytes(path) == 1 << 20
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert sum(mapped[::4096]) == 0
    with pytest.raises(RuntimeError, match="1048576 of 1048576 bytes are still in the page cache"):
        cold.make_cold([path])
    mapped.close()
    cold.make_cold([path])


def test_random_reads_of_our_own_loop(parts, tmp_path, monkeypatch):
    if not plain_disk(tmp_path):
        pytest.skip("no direct reads here")
    limits = parts["limits"]
    monkeypatch.setattr(limits.shutil, "which", lambda _: None)
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(1 << 20))
    assert "fio is not installed" in limits.reader_name()
    try:
        assert limits.random_reads(files, 8192, 500, depth=32) > 0
    except OSError as error:
        pytest.skip(f"no asynchronous reads here: {error}")


def test_sparse_stores_are_stores(parts, tmp_path):
    path = parts["growth"].sparse_store(tmp_path / "sparse", 5)
    with mmcache.open(path) as store:
        assert store.n_shards("x") == 5
        assert store["x"].shape == (1, 5 * 2048, 1024)
        assert not store["x"].gather([0, 2048, -1]).any()
        assert store["x"].get_position(0, 5000).dtype == torch.bfloat16
    assert sum(file.stat().st_blocks * 512 for file in (path / "x").iterdir()) < 1 << 20


def test_a_plot_of_anything(parts, tmp_path):
    pytest.importorskip("matplotlib")
    compare, series = parts["measure"].compare, parts["measure"].Series
    rows = [
        compare(f"{kind} {place}", "what", "beside", "GB/s", [1.0, 2.0], [1.0, 1.0], kind=kind, goal=0.9)
        for place, kind in enumerate(("limit", "peer", "self", "peer"))
    ]
    grown = [series("name", "shards", "ms", (1, 10), {"a": (1.0, 2.0)})] * 4
    for number, (some, lines) in enumerate([(rows, grown), (rows[:1], []), ([], grown[:1]), ([], [])]):
        for suffix in ("png", "svg"):
            parts["plot"].draw(tmp_path / f"{number}.{suffix}", some, lines)
            assert (tmp_path / f"{number}.{suffix}").stat().st_size > 500


def bench(tmp_path, *options):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "bench.py"), "--folder", str(tmp_path), "--quick", "--repeats", "1", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


OURS = {
    "writes": ["push", "append token", "append layer", "staging"],
    "rows": ["cold row", "warm row"],
    "gathers": ["cold gather", "cold gather, memmap", "warm gather", "warm gather, first touch"],
    "feed": ["cold feed", "warm feed"],
    "busy": ["busy gather", "busy row", "busy feed"],
    "shards": ["open 1000 shards", "row of 1000 shards"],
    "looking": ["info", "map", "map, bytes read", "zoom"],
    "growth": [],
    "gpu": [],
}
# What takes longer: whole processes, and every peer.
SLOW = {
    "extract": ["extract", "extract, logits", "extract, SAELens"],
    "memory": ["memory, push", "memory, chunks"],
    "peer-writes": ["write, np.memmap", "write, torch.save", "write, safetensors", "write, zarr-python"],
    "peer-loaders": ["loader, np.memmap, cold", "loader, safetensors, warm"],
}


@pytest.mark.parametrize("groups", [OURS, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["ours", "peers"])
def test_a_tiny_run_has_every_row_or_says_why_not(tmp_path, groups):
    if not plain_disk(tmp_path):
        pytest.skip("cold reads cannot be measured here")
    given = ["--size", "16M", "--peer-size", "8M", "--tokens", "512", "--json", str(tmp_path / "found.json")]
    done = bench(tmp_path, *given, "--only", ",".join(groups))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"system", "disk", "read_ahead_kb", "versions"} <= set(found["machine"])
    names = [row["name"] for row in [*found["rows"], *found["skipped"]]]
    assert len(set(names)) == len(names)
    assert {name for some in groups.values() for name in some} <= set(names)
    for row in found["rows"]:
        assert row["kind"] in {"limit", "peer", "self"}
        assert row["unit"]
        assert min(row["ours"], row["theirs"], row["ratio"]) > 0, row
        assert len(row["all_ours"]) == len(row["all_theirs"]) >= 1
        if row["kind"] == "peer":
            assert any(character.isdigit() for character in row["beside"]), "a peer says its version"
        assert f": {row['name']} " in done.stderr
    for skip in found["skipped"]:
        assert skip["reason"]
        assert skip["name"] in done.stdout
    assert [len(series["xs"]) for series in found["series"]] == [
        len(values) for series in found["series"] for values in list(series["values"].values())[:1]
    ]
    # Nothing is left behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "probe"]


def test_a_row_below_its_floor_fails_the_check(tmp_path):
    floors = tmp_path / "floors.json"
    given = ["--only", "shards", "--size", "16M", "--floors", str(floors)]
    floors.write_text(json.dumps({"quick": {"row of 1000 shards": 1e-6}}))
    if plain_disk(tmp_path):
        assert bench(tmp_path, *given, "--check").returncode == 0
        floors.write_text(json.dumps({"quick": {"row of 1000 shards": 1e6}}))
        done = bench(tmp_path, *given, "--check")
        assert done.returncode == 1
        assert "slower: row of 1000 shards" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"), [(["--only", "nothing"], "'nothing'"), (["--size", "large"], "'large': expected a number")]
)
def test_what_makes_no_sense_is_told(tmp_path, options, said):
    done = bench(tmp_path, *options)
    assert done.returncode == 2
    assert said in done.stderr
