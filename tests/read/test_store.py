"""Reading a store: rows, gathers, slices, sequences; shards that do not belong; threads, processes, descriptors."""

import multiprocessing
import os
import shutil
import threading

import numpy as np
import pytest
import torch

import mmcache
from mmcache.read.site_view import MAX_MAPS
from stores_and_processes import (
    FORKS,
    Twin,
    damage,
    file_descriptors,
    fill,
    flip,
    maps_below,
    same,
    shards,
    tree,
    without_sync,
)

pytestmark = pytest.mark.portable

SITES = {"mlp_in": 8, "mlp_out": 24}
LENGTHS = (100, 1, 300, 156, 50)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_sync(monkeypatch)


@pytest.fixture(scope="module", params=["layer", "token"])
def made(request, tmp_path_factory):
    """Give the path of a store of five sequences in three blocks, and its twin."""
    path = tmp_path_factory.mktemp("store") / "acts"
    return path, build(path, layout=request.param)


def build(path, *, layout="token", n_layers=3, lengths=LENGTHS, sites=None, shard_tokens=256):
    sites = sites or SITES
    twin = Twin(sites, n_layers, torch.float32, [3])
    with mmcache.create(
        path,
        sites=sites,
        n_layers=n_layers,
        dtype=torch.float32,
        layout=layout,
        shard_tokens=shard_tokens,
        special_tokens=[3],
    ) as writer:
        for number, length in enumerate(lengths):
            fill(twin, writer, length, seed=number)
    return twin


@pytest.fixture
def own(made, tmp_path):
    """Give a store that may be damaged, and its twin."""
    path, twin = made
    shutil.copytree(path, tmp_path / "acts")
    return tmp_path / "acts", twin


@pytest.fixture
def store(made):
    with mmcache.open(made[0]) as store:
        yield store


@pytest.fixture
def rows(made):
    """Give what `mlp_out` holds: `[n_layers, n_tokens, d_model]`."""
    return made[1].rows["mlp_out"]


TOTAL = sum(LENGTHS)


# Rows, gathers and slices


def test_everything_comes_back(made, store):
    made[1].check(store)


def test_every_row(store, rows):
    for layer in range(3):
        for position in [0, 1, 99, 255, 256, 257, 511, 512, TOTAL - 1]:
            assert same(store["mlp_out"].get_position(layer, position), rows[layer, position])
            back = position - TOTAL
            assert same(store["mlp_out"].get_position(layer, back), rows[layer, position])
            assert same(store["mlp_out"][layer, position], rows[layer, position])
            assert same(store["mlp_out"][layer, back], rows[layer, position])


GATHERS = {
    "in order": list(range(0, TOTAL, 7)),
    "backwards": range(TOTAL - 1, -1, -1),
    "shuffled": torch.randperm(TOTAL, generator=torch.Generator().manual_seed(0)),
    "repeated": [5, 5, 400, 5, 400, 400],
    "negative": np.array([-1, -TOTAL, 3, -300], np.int16),
    "one": (511,),
    "nothing": [],
}


@pytest.mark.parametrize("kind", GATHERS)
@pytest.mark.parametrize("layers", [None, [0], [2, 0], [1, 1], []])
def test_gather(store, rows, kind, layers):
    positions = GATHERS[kind]
    picked = torch.as_tensor(np.asarray(positions, dtype=np.int64))
    expected = rows[:, picked] if layers is None else rows[layers][:, picked]
    found = store["mlp_out"].gather(positions, layers=layers)
    assert same(found, expected.transpose(0, 1).contiguous())
    assert found.is_contiguous()
    found.fill_(0)
    assert same(store["mlp_out"].gather(positions, layers=layers), expected.transpose(0, 1).contiguous())


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=repr)
def test_gather_for_a_device(store, rows, device):
    assert same(store["mlp_out"].gather([3, 1], device=device), rows[:, [3, 1]].transpose(0, 1).contiguous())
    assert same(store["mlp_out"].get_layer(1, device), rows[1])
    assert same(store["mlp_out"].get_position(1, 2, device), rows[1, 2])
    assert same(store["mlp_out"].sequence(1, device), rows[:, 100:101])
    # The caller's own memory, however the host is called.
    store["mlp_out"].get_position(1, 2, device).fill_(0)
    store["mlp_out"].get_layer(1, device).fill_(0)
    assert same(store["mlp_out"].get_layer(1), rows[1])


def test_gather_into(store, rows):
    expected = rows[:, [9, 0, 300]].transpose(0, 1).contiguous()
    out = torch.full((3, 3, 24), torch.nan)
    assert store["mlp_out"].gather([9, 0, 300], out=out) is out
    assert same(out, expected)
    # Into a part of something larger, which stays as it is around it.
    large = torch.full((5, 3, 48), -1.0)
    part = large[1:4, :, ::2]
    assert store["mlp_out"].gather([9, 0, 300], out=part) is part
    assert same(part.contiguous(), expected)
    assert (large[0] == -1).all()
    assert (large[4] == -1).all()
    assert (large[..., 1::2] == -1).all()
    empty = torch.empty(0, 3, 24)
    assert store["mlp_out"].gather([], out=empty) is empty


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.empty(2, 3, 23), mmcache.ShapeError, r"out is \(2, 3, 23\) .*: expected \(2, 3, 24\)"),
        (torch.empty(3, 2, 24), mmcache.ShapeError, "expected"),
        (torch.empty(2 * 3 * 24), mmcache.ShapeError, "expected"),
        (torch.empty(2, 3, 24, dtype=torch.float64), mmcache.DtypeError, "float64: expected .* torch.float32"),
    ],
)
def test_gather_into_what_does_not_fit(store, out, error, message):
    before = out.clone()
    with pytest.raises(error, match=message):
        store["mlp_out"].gather([1, 2], out=out)
    assert same(out, before)


SLICES = [
    slice(None),
    slice(0, 0),
    slice(10, 20),
    slice(250, 260),
    slice(256, 512),
    slice(255, 513),
    slice(-10, None),
    slice(None, -600),
    slice(5, 10_000),
    slice(10_000, 20_000),
    slice(20, 10),
    slice(None, None, 3),
    slice(500, 10, -7),
    slice(None, None, -1),
    slice(-1, -TOTAL - 1, -100),
    slice(np.int64(3), torch.tensor(9)),
]


@pytest.mark.parametrize("part", SLICES, ids=str)
def test_slices_are_pythons(store, rows, part):
    expected = torch.from_numpy(rows[1].numpy()[part].copy())
    found = store["mlp_out"][1, part]
    assert same(found, expected)
    found.fill_(0)
    assert same(store["mlp_out"][1, part], expected)


@pytest.mark.parametrize("key", [0, slice(3), (0,), (0, 1, 2), "mlp_in", None], ids=str)
def test_other_keys_are_refused(store, key):
    with pytest.raises(mmcache.ArgumentError, match=r"expected \[layer, start:stop\] or \[layer, position\]"):
        store["mlp_out"][key]


@pytest.mark.parametrize("layer", [3, -1, 100])
def test_layers_out_of_range(store, layer):
    view = store["mlp_out"]
    assert view.get_layer(layer) is None
    uses = [
        lambda: view.get_position(layer, 0),
        lambda: view.get_positions(layer, [0]),
        lambda: view.gather([0], layers=[0, layer]),
        lambda: view[layer, 0],
        lambda: view[layer, 3:5],
        lambda: view[layer, 3:3],
    ]
    for use in uses:
        with pytest.raises(IndexError, match=rf"layer {layer} not in cache \(n_layers=3\)"):
            use()


@pytest.mark.parametrize("position", [TOTAL, -TOTAL - 1, 2**62])
def test_positions_out_of_range(store, position):
    view = store["mlp_out"]
    uses = [
        lambda: view.get_position(0, position),
        lambda: view[0, position],
        lambda: view.gather([0, 5, position]),
        lambda: view.get_positions(0, np.array([position])),
    ]
    for use in uses:
        with pytest.raises(IndexError, match=rf"position {position} out of range \(n_tokens={TOTAL}"):
            use()


# Sequences, tokens, sites


def test_sequences(made, store, rows):
    twin = made[1]
    assert len(store.sequences) == store.n_sequences == 5
    assert store.sequences[2] == (101, 401, 2)
    assert store.sequences[-1].document == 4
    assert [span.start for span in store.sequences[1:3]] == [100, 101]
    assert [list(span) for span in store.sequences.tolist()] == twin.spans
    assert np.asarray(store.sequences).tolist() == twin.spans
    for number, (start, stop, _) in enumerate(store.sequences):
        assert same(store["mlp_out"].sequence(number), rows[:, start:stop].contiguous())
    assert same(store["mlp_out"].sequence(-1), rows[:, -50:].contiguous())
    for number in (5, -6):
        with pytest.raises(IndexError, match=rf"sequence {number} not in store \(n_sequences=5\)"):
            store["mlp_out"].sequence(number)


def test_what_sequences_give_cannot_change_the_store(made, store):
    store.sequences.numpy()[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(store.sequences)[0, 0] = 5
    made[1].check(store)


def test_locate(made, store):
    twin = made[1]
    for position in (0, 99, 100, 101, 255, 256, 400, 401, TOTAL - 1, -1, -TOTAL):
        found = store.locate(position)
        at = position % TOTAL
        number = next(number for number, span in enumerate(twin.spans) if span[0] <= at < span[1])
        assert found == (number, at - twin.spans[number][0], twin.tokens[at])
        assert found.token_id == store.tokens[at]
    for position in (TOTAL, -TOTAL - 1):
        with pytest.raises(IndexError, match=f"position {position} not in store"):
            store.locate(position)


def test_tokens_and_flags_are_not_the_file(made, store):
    before = tree(made[0])
    assert (store.tokens.dtype, store.flags.dtype) == (torch.int32, torch.uint8)
    store.tokens.fill_(9)
    store.flags.fill_(9)
    assert tree(made[0]) == before
    with mmcache.open(made[0]) as again:
        made[1].check(again)


def test_unknown_sites(store):
    with pytest.raises(KeyError) as caught:
        store["resid_mid"]
    assert isinstance(caught.value, mmcache.UnknownSiteError)
    # KeyError prints the repr of its argument: a message in quotes, with its own quotes escaped.
    assert str(caught.value) == f"site 'resid_mid' not in {store.path} (sites: mlp_in, mlp_out)"
    assert "resid_mid" not in store
    assert list(store) == ["mlp_in", "mlp_out"]
    assert "mlp_in" in store


def test_a_store_says_what_it_is(made, store):
    assert repr(store) == (
        f"Store({str(made[0])!r}, sites=['mlp_in', 'mlp_out'], n_layers=3, n_tokens={TOTAL}, n_sequences=5, "
        f"dtype=torch.float32, layout={store.layout!r})"
    )
    assert repr(store["mlp_in"]) == (
        f"SiteView('mlp_in', shape=(3, {TOTAL}, 8), dtype=torch.float32, layout={store.layout!r})"
    )
    assert (store["mlp_in"].layers, len(store["mlp_in"]), store["mlp_in"].d_model) == ((0, 1, 2), 3, 8)
    assert store["mlp_in"] is store["mlp_in"]


def test_nothing_is_written_by_reading(made):
    before = tree(made[0])
    times = {file: file.stat().st_mtime_ns for file in made[0].rglob("*")}
    with mmcache.open(made[0]) as store:
        made[1].check(store)
        assert store["mlp_in"].statistics is not None
    assert tree(made[0]) == before
    assert {file: file.stat().st_mtime_ns for file in made[0].rglob("*")} == times


def test_a_closed_store_can_be_read_again(made):
    store = mmcache.open(made[0])
    made[1].check(store)
    assert maps_below(made[0])
    store.close()
    assert not maps_below(made[0])
    made[1].check(store)
    store.close()


# Shards that do not belong


def read_everything(path, twin):
    with mmcache.open(path) as store:
        twin.check(store)


def test_a_shard_that_is_gone(own):
    path, _ = own
    gone = shards(path / "mlp_in")[-1]
    gone.unlink()
    with pytest.raises(mmcache.CorruptError, match=r"1 of \d shards of mlp_in are gone"):
        mmcache.open(path)


def test_a_shard_that_goes_while_the_store_is_open(own):
    path, _ = own
    with mmcache.open(path) as store:
        shards(path / "mlp_in")[0].unlink()
        with pytest.raises(mmcache.IncompleteError, match=r"c\.0\.0\.0"):
            store["mlp_in"].get_position(0, 0)
        # The other rows, and the other site, can still be read.
        assert store["mlp_in"].get_position(0, 300).shape == (8,)
        assert store["mlp_out"].get_position(0, 0).shape == (24,)


DAMAGES = {
    "cut to nothing": lambda _: b"",
    "cut in the header": lambda data: data[:1000],
    "cut in the rows": lambda data: data[:6000],
    "cut by a page": lambda data: data[:-4096],
    "cut by a byte": lambda data: data[:-1],
    "longer by a byte": lambda data: data + b"\0",
    "longer by a page": lambda data: data + bytes(4096),
    "a byte of the header": flip(20),
    "a byte of the header's length": flip(0),
    "a byte of the header's padding": flip(4000),
    "zeros": lambda data: bytes(len(data)),
    "something else": lambda data: b"PK\x03\x04" + data[4:],
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("array", ["mlp_out", "tokens", "sequences"])
def test_a_damaged_shard_is_refused(own, kind, array):
    path, twin = own
    victim = shards(path / array)[0]
    damage(victim, DAMAGES[kind])
    with pytest.raises(mmcache.CorruptError, match=str(victim)):
        read_everything(path, twin)


@pytest.mark.parametrize("array", ["tokens", "flags", "sequences"])
def test_a_flipped_bit_in_the_small_arrays_is_refused(own, array):
    path, twin = own
    victim = shards(path / array)[0]
    damage(victim, flip(4096 + 3))
    with pytest.raises(mmcache.CorruptError, match=f"{victim}: inner chunk 0 does not match its checksum"):
        read_everything(path, twin)


def test_swapped_shards_are_refused(own):
    path, twin = own
    one, other = shards(path / "mlp_out")[:2]
    data = one.read_bytes()
    damage(one, lambda _: other.read_bytes())
    damage(other, lambda _: data)
    with pytest.raises(mmcache.CorruptError, match=f"{one}.*was moved"):
        read_everything(path, twin)


def test_a_shard_of_another_store_is_refused(own, tmp_path):
    path, twin = own
    with mmcache.open(path) as store:
        build(tmp_path / "other", layout=store.layout)
    victim = shards(path / "mlp_out")[0]
    damage(victim, lambda _: (tmp_path / "other" / "mlp_out" / victim.name).read_bytes())
    with pytest.raises(mmcache.CorruptError, match=f"{victim}.*comes from another store"):
        read_everything(path, twin)


def test_a_shard_of_fewer_rows_is_refused(tmp_path):
    # As after a restore from a backup of an earlier commit.
    path = tmp_path / "acts"
    twin = build(path, lengths=(100,))
    earlier = {site: shards(path / site)[0].read_bytes() for site in SITES}
    with mmcache.append(path) as writer:
        fill(twin, writer, 20, seed=9)
    damage(shards(path / "mlp_in")[0], lambda _: earlier["mlp_in"])
    with pytest.raises(mmcache.CorruptError, match="has 100 rows, the store counts 120"):
        read_everything(path, twin)


def test_a_folder_in_the_place_of_a_shard_is_refused(own):
    path, twin = own
    victim = shards(path / "mlp_in")[0]
    victim.unlink()
    victim.mkdir()
    with pytest.raises(mmcache.MmcacheError, match=str(victim)):
        read_everything(path, twin)


# Descriptors, threads, processes


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Give a store of two sites with 300 shards each, and its twin."""
    path = tmp_path_factory.mktemp("wide") / "acts"
    twin = build(path, n_layers=1, lengths=(300 * 64,), sites=dict.fromkeys("ab", 16), shard_tokens=64)
    return path, twin


def test_many_shards_need_few_descriptors(wide):
    path, twin = wide
    assert len(shards(path / "a")) == 300 > MAX_MAPS
    before = file_descriptors()
    with mmcache.open(path) as store:
        twin.check(store)
        order = torch.randperm(300 * 64, generator=torch.Generator().manual_seed(0))
        for site in "ab":
            assert same(store[site].gather(order), twin.rows[site][:, order].transpose(0, 1).contiguous())
            for position in order[:1000].tolist():
                assert same(store[site].get_position(0, position), twin.rows[site][0, position])
        # For the whole store, not for each of its sites: a process may often have no more than 1,024.
        assert file_descriptors() - before <= MAX_MAPS
    assert file_descriptors() == before


def together(work, count=8):
    """Run `work(number)` in threads that start at once, and raise what went wrong in any of them."""
    start, wrong = threading.Barrier(count), []

    def run(number):
        try:
            start.wait()
            work(number)
        except BaseException as error:  # noqa: BLE001 -- raised again below
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def test_threads_may_read_together(wide):
    # More shards than maps, so that one thread drops what another is reading from.
    path, twin = wide
    with mmcache.open(path) as store:

        def read(number):
            site = "ab"[number % 2]
            generator = torch.Generator().manual_seed(number)
            for _ in range(10):
                picked = torch.randint(-300 * 64, 300 * 64, (200,), generator=generator)
                assert same(store[site].gather(picked), twin.rows[site][:, picked].transpose(0, 1).contiguous())
                at = int(picked[0])
                assert same(store[site].get_position(0, at), twin.rows[site][0, at])

        together(read)


def test_threads_may_open_sites_and_tokens_together(made):
    path, twin = made
    for _ in range(5):
        with mmcache.open(path) as store:
            together(lambda _, store=store: twin.check(store))


def child(path, twin, inherited=None):
    """Read everything in a process of its own."""
    torch.set_num_threads(1)
    with inherited or mmcache.open(path) as store:
        twin.check(store)


def in_processes(method, count, *given):
    context = multiprocessing.get_context(method)
    children = [context.Process(target=child, args=given) for _ in range(count)]
    for process in children:
        process.start()
    yield
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0] * count


@FORKS
def test_forked_processes_may_read_with_the_maps_of_their_parent(made):
    path, twin = made
    with mmcache.open(path) as store:
        twin.check(store)
        for _ in in_processes("fork", 3, path, twin, store):
            twin.check(store)
        twin.check(store)


def test_a_spawned_process_opens_the_store_itself(wide):
    path, twin = wide
    with mmcache.open(path) as store:
        for _ in in_processes("spawn", 1, path, twin):
            twin.check(store)


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_a_store_may_be_opened_while_a_writer_commits(tmp_path, layout):
    path = tmp_path / "acts"
    twin = build(path, layout=layout, lengths=(10,))
    states, done, seen = [twin.copy()], threading.Event(), set()

    def write():
        try:
            with mmcache.append(path) as writer:
                for number in range(25):
                    fill(twin, writer, 37, seed=number, continues=number % 2 == 0)
                    # Before it can be seen, so that whoever opens it finds it here.
                    states.append(twin.copy())
                    writer.commit()
        finally:
            done.set()

    thread = threading.Thread(target=write)
    early = mmcache.open(path)
    thread.start()
    while not done.is_set():
        with mmcache.open(path) as store:
            number = (store.n_tokens - 10) // 37
            states[number].check(store)
            seen.add(number)
    thread.join()
    assert len(seen) > 1, "nothing was read while it was being written"
    # One that was opened at the beginning, and only reads now, has what it had then.
    with early:
        states[0].check(early)
    twin.check_path(path)


def test_a_reader_keeps_a_shard_that_is_extended_behind_it(tmp_path):
    path = tmp_path / "acts"
    twin = build(path, lengths=(100,))
    before = twin.copy()
    with mmcache.open(path) as store:
        before.check(store)
        with mmcache.append(path) as writer:
            fill(twin, writer, 100, seed=5)
        before.check(store)
        store.close()
        before.check(store)


# Opening


def test_open_refuses_what_is_no_store(tmp_path):
    with pytest.raises(mmcache.StoreNotFoundError, match="no mmcache store there") as caught:
        mmcache.open(tmp_path / "nothing")
    assert isinstance(caught.value, FileNotFoundError)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.open(tmp_path / "file")
    with pytest.raises(mmcache.StoreNotFoundError):
        mmcache.open(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(mmcache.CorruptError, match="is no mmcache store's"):
        mmcache.open(tmp_path)


def test_open_takes_text(made):
    with mmcache.open(os.fspath(made[0])) as store:
        made[1].check(store)


def test_layers_are_numbers_of_the_model(tmp_path):
    # All sites of a store have the same layers, from 0 on where `create` made it.
    path = tmp_path / "acts"
    build(path, n_layers=5, lengths=(3,))
    with mmcache.open(path) as store:
        assert store.layers == (0, 1, 2, 3, 4)
        assert store.layers == store["mlp_in"].layers == store["mlp_out"].layers


def test_pieces_of_tokens_and_flags_are_read_alone(tmp_path):
    twin = Twin({"a": 8}, 2, torch.float32, special=(3,))
    with mmcache.create(
        tmp_path / "acts", sites={"a": 8}, n_layers=2, dtype=torch.float32, special_tokens=[3]
    ) as writer:
        for seed, length in enumerate((300, 20, 500)):
            fill(twin, writer, length, seed=seed)
    store = mmcache.open(tmp_path / "acts")
    for start, stop in ((0, 820), (299, 301), (5, 5), (819, 820)):
        assert store.read_tokens(start, stop).tolist() == twin.tokens[start:stop]
        assert store.read_flags(start, stop).tolist() == twin.flags[start:stop]
    assert not store._arrays._whole, "the others were left where they are"
    assert [store.locate(at).token_id for at in (0, 310, -1)] == [twin.tokens[at] for at in (0, 310, -1)]
    assert store.tokens.tolist() == twin.tokens
    assert store.read_tokens(7, 9).tolist() == twin.tokens[7:9]
    assert store.counted(0, 820).tolist() == [not flag & 7 for flag in twin.flags]
    assert store.shards("a").present().tolist() == [[True]]
    assert store.manifest.n_tokens == 820


def test_pieces_of_a_cache_are_unknown(tmp_path):
    with mmcache.FullActivationCache.with_capacity(1, tmp_path / "acts") as cache:
        cache.push(torch.randn(50, 4))
    store = mmcache.open(tmp_path / "acts")
    assert store.read_tokens(3, 6).tolist() == [-1] * 3
    assert store.read_flags(3, 6).tolist() == [0] * 3
    with pytest.raises(mmcache.UnknownSiteError):
        store.shards("b")
