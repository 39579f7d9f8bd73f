"""Every token once, aligned, resumable at any step, in memory that nobody else writes to; and threads that end."""

import gc
import itertools
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmcache
from dataset_feeds import SITES, SMALL, check, fingerprint, make_shared, make_store, positions
from mmcache.read.site_view import SiteView
from mmcache.training import fetcher
from mmcache.training.prefetch import BatchIterator
from mmcache.training.schedule import Position
from stores_and_processes import DTYPES, FORKS, forked, python, same, threads_named, wait_for, without_sync

SHUFFLES = ("global", "block", None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_shared(tmp_path_factory.mktemp("feed"))


def dataset(store, **options):
    return mmcache.ActivationDataset(store, **{"batch_size": 64, "buffer_bytes": SMALL} | options)


def leaving(store, tokens):
    """Give the mask to drop that leaves so many tokens."""
    mask = np.ones(store.n_tokens, bool)
    mask[np.random.default_rng(0).permutation(store.n_tokens)[:tokens]] = False
    return mask


def threads():
    """Those of datasets: others may be of stores in buckets, which other tests left open."""
    return threads_named("fetch", "read-ahead", "bring-all")


def assert_quiet():
    wait_for(lambda: not threads())


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 1000, 997])
def test_every_token_comes_once_an_epoch_over_the_ranks(store, tokens, ranks, shuffle):
    mask = leaving(store, tokens)
    expected = np.flatnonzero(~mask).tolist()
    for size in (1, 3, 256) if tokens < 10 else (7, 256, 2000):
        for drop_last in (False, True):
            options = {"batch_size": size, "drop_last": drop_last, "drop": mask, "shuffle": shuffle}
            shares = [dataset(store, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
            whole = dataset(store, **options | {"batch_size": size * ranks})
            for epoch in range(2):
                found = [list(share) for share in shares]
                assert {len(batches) for batches in found} == {len(shares[0])}
                sizes = [[len(batch.positions) for batch in batches] for batches in found]
                assert all(len(set(column)) == 1 for column in zip(*sizes, strict=True)) or not drop_last
                seen = [at for step in zip(*found, strict=True) for at in positions(step)]
                kept = tokens // (size * ranks) * size * ranks if drop_last else tokens
                assert len(seen) == kept
                # It is the order of one process, in the order of the steps and ranks.
                assert seen == positions(whole)[:kept]
                if not drop_last:
                    assert sorted(seen) == expected
                assert {share.epoch for share in shares} == {epoch + 1}


def test_batches_of_one(store):
    data = dataset(store, batch_size=1, drop=())
    seen = [int(batch.positions) for batch in data]
    assert sorted(seen) == list(range(store.n_tokens))


def test_the_next_epoch_is_in_another_order(store):
    data = dataset(store, drop=())
    epochs = [positions(data) for _ in range(3)]
    assert len(set(map(tuple, epochs))) == 3
    assert positions(dataset(store, drop=())) == epochs[0]
    assert positions(dataset(store, drop=(), seed=1)) not in epochs
    data.set_epoch(1)
    assert positions(data) == epochs[1]
    text = dataset(store, drop=(), shuffle=None)
    assert positions(text) == positions(text) == list(range(store.n_tokens))


@pytest.mark.parametrize("layout", ["layer", "token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_of_their_tokens(tmp_path, monkeypatch, layout, dtype):
    without_sync(monkeypatch)
    store = make_store(tmp_path / "acts", [100, 3, 60], dtype=dtype, layout=layout)
    for shuffle, layers, sites in itertools.product(SHUFFLES, (None, [2, 0]), (None, ["narrow"])):
        data = dataset(store, shuffle=shuffle, layers=layers, sites=sites, batch_size=30, buffer_bytes=SMALL * 4)
        seen = []
        for batch in data:
            check(batch, store, layers=layers, sites=sites)
            seen += positions([batch])
        assert sorted(seen) == np.flatnonzero((store.flags.numpy() & 7) == 0).tolist()


def test_a_cache_can_be_trained_on(tmp_path):
    rows = torch.randn(2, 50, 8)
    with mmcache.FullActivationCache.with_capacity(2, tmp_path / "cache") as cache:
        for layer in rows:
            cache.push(layer)
    data = dataset(mmcache.open(tmp_path / "cache"), drop=(), batch_size=20)
    for batch in data:
        assert same(batch["resid_post"], rows[:, batch.positions].transpose(0, 1).contiguous())
        assert batch.tokens.tolist() == [-1] * len(batch.positions)


def test_drop_and_split_leave_exactly_these(store):
    flags = store.flags.numpy()
    parts = [
        sorted(positions(dataset(store, split=mmcache.Split(part, 0.3, seed=5), drop=("bos", 8))))
        for part in ("train", "validation")
    ]
    assert sorted(parts[0] + parts[1]) == np.flatnonzero((flags & 9) == 0).tolist()
    among = {store.sequences.find(at) for at in parts[1]}
    assert among.isdisjoint(store.sequences.find(at) for at in parts[0])
    data = dataset(store, drop=("bos", 8), batch_size=10)
    assert data.n_tokens == ((flags & 9) == 0).sum()
    assert len(data) == len(list(data)) == -(-data.n_tokens // 10)


@pytest.mark.parametrize("normalize", [None, "scalar", "per_dim"])
@pytest.mark.parametrize("dtype", [None, "float32", torch.float16])
def test_casts_and_normalises_as_plain_torch(store, dtype, normalize):
    data = dataset(store, dtype=dtype, normalize=normalize, layers=[1, 2])
    for batch in data:
        for site in SITES:
            wanted = store[site].gather(batch.positions, layers=[1, 2])
            if normalize:
                shift, scale = (part[1:].float() for part in store[site].statistics.normalizer(normalize))
                wanted = (wanted.float() - shift) * scale
            assert same(batch[site], wanted.to({None: torch.bfloat16, "float32": torch.float32}.get(dtype, dtype)))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"normalize": "scalar"}], ids=str)
def test_a_batch_is_its_holders_own_and_comes_back_when_it_is_dropped(store, options):
    data = dataset(store, batch_size=50, **options)
    held, views, addresses = {}, {}, []
    # Several epochs: how many batches the first takes before any comes back is a matter of the threads' pace.
    for number, batch in enumerate(batch for _ in range(4) for batch in data):
        addresses.append(batch["wide"].data_ptr())
        if number < len(data) and number % 5 == 0:
            held[number] = fingerprint(batch), batch
        if number < len(data) and number % 5 == 1:
            # Nothing but a part of one site, as numpy sees it.
            part = batch["narrow"][3:7, 1].float().numpy() if not options else batch["narrow"][3:7, 1].clone().float()
            views[number] = batch["narrow"][3:7, 1], part
        batch["narrow"].add_(0)
    for number, (expected, batch) in held.items():
        assert fingerprint(batch) == expected, number
        check(batch, store) if not options else None
    for number, (view, expected) in views.items():
        assert torch.equal(view.float(), torch.as_tensor(expected)), number
    # The held ones have memory of their own, and all others took turns.
    own = [addresses[number] for number in (*held, *views)]
    assert len(set(own)) == len(own)
    assert len(set(addresses)) < len(own) + data._ahead + 4 < len(addresses)


def test_memory_goes_on_into_the_next_epoch(store):
    data = dataset(store)
    addresses = {batch["wide"].data_ptr() for _ in range(3) for batch in data}
    # Those under way, the caller's, and the one that takes its place.
    assert len(addresses) <= data._ahead + 2 < 3 * len(data)


def test_keeping_all_batches_is_fine(store):
    data = dataset(store, batch_size=20)
    batches = list(data)
    assert len({batch["wide"].data_ptr() for batch in batches}) == len(batches)
    for batch in batches:
        check(batch, store)


@pytest.mark.parametrize("how", ["end", "break", "raise", "drop", "close"])
def test_threads_end_with_the_loop(store, how):
    data = dataset(store, shuffle="block", batch_size=8)
    assert_quiet()
    if how == "end":
        list(data)
    elif how == "break":
        for _ in data:
            assert threads()
            break
    elif how == "raise":
        with pytest.raises(KeyError, match="mine"):  # noqa: PT012 -- the loop is what ends
            for _ in data:
                raise KeyError("mine")
    else:
        batches = iter(data)
        next(batches)
        if how == "close":
            batches.close()
            assert list(batches) == []
        del batches
    gc.collect()
    assert_quiet()
    # As if nothing had been.
    assert len(list(data)) == len(data)


def test_an_iterator_that_was_never_used_starts_nothing(store):
    batches = iter(dataset(store))
    assert_quiet()
    del batches


@pytest.mark.parametrize("how", ["global", "raise", "cycle"])
def test_the_interpreter_ends_in_the_middle_of_an_epoch(store, how):
    code = """
import sys, warnings
import mmcache
warnings.simplefilter("error")
data = mmcache.ActivationDataset(mmcache.open(sys.argv[1]), batch_size=4, shuffle="block", buffer_bytes=20_000)
batches = iter(data)
print(len(next(batches).positions))
if sys.argv[2] == "raise":
    for batch in data:
        raise RuntimeError("mine")
if sys.argv[2] == "cycle":
    data.me, data.batches = data, batches
"""
    done = python(code, store.path, how)
    assert done.stdout == "4\n"
    assert done.returncode == (how == "raise")
    assert done.stderr == "" or (how == "raise" and done.stderr.endswith("RuntimeError: mine\n"))


def grouped(monkeypatch, most):
    """Let at most so many batches be fetched together."""
    monkeypatch.setattr("mmcache.training.dataset._MOST_TOGETHER", most)


@pytest.mark.parametrize("most", [1, 2, 8])
def test_a_token_that_cannot_be_read_ends_the_epoch_behind_the_batches_before_it(store, monkeypatch, most):
    grouped(monkeypatch, most)
    gather = fetcher.gather_together
    data = dataset(store, sites=["wide"], batch_size=50)
    expected = positions(dataset(store, sites=["wide"], batch_size=50))
    for bad in (0, 7, 13):
        token = expected[bad * 50 + 20]

        def fail(wanted, token=token):
            gather(wanted)
            if any(token in one.positions for one in wanted):
                raise mmcache.CorruptError("this one")

        data.set_epoch(1)
        data.set_epoch(0)
        monkeypatch.setattr(fetcher, "gather_together", fail)
        batches, found = iter(data), []
        with pytest.raises(mmcache.CorruptError, match="this one"):
            found.extend(batches)
        assert list(batches) == []
        assert positions(found) == expected[: bad * 50]
        assert data.state_dict()["step"] == len(found)
        assert_quiet()
        # It goes on from the last good one.
        monkeypatch.setattr(fetcher, "gather_together", gather)
        data.load_state_dict(data.state_dict())
        assert positions(found) + positions(data) == expected


def test_what_fails_once_when_batches_are_fetched_together_comes_one_by_one(store, monkeypatch):
    grouped(monkeypatch, 4)
    gather, calls = fetcher.gather_together, itertools.count()

    def fail(wanted):
        if next(calls) % 5 == 2:
            raise OSError("not now")
        gather(wanted)

    monkeypatch.setattr(fetcher, "gather_together", lambda wanted: fail(wanted) if len(wanted) > 1 else gather(wanted))
    options = {"sites": ["wide"], "batch_size": 20}
    assert positions(dataset(store, **options)) == positions(dataset(store, **options, rank=0, world_size=1))
    assert next(calls) > 3


def test_no_more_than_so_many_are_fetched_ahead(store, monkeypatch):
    gather, done = fetcher.gather_together, []

    def record(wanted):
        done.extend(wanted)
        return gather(wanted)

    data = dataset(store, sites=["wide"], batch_size=5)
    monkeypatch.setattr(fetcher, "gather_together", record)
    assert (data._group, data._ahead) == (8, 32)
    for number, _ in enumerate(data):
        if number % 20 == 0:
            time.sleep(0.02)
        assert len(done) <= number + 1 + data._ahead
    assert len(done) == len(data)


def test_large_batches_are_fetched_each_by_itself(store, monkeypatch):
    monkeypatch.setattr("mmcache.training.dataset._GROUP_BYTES", 1)
    data = dataset(store)
    assert (data._group, data._ahead) == (1, 4)
    assert len(list(data)) == len(data)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_batches_are_the_same_however_many_are_fetched_together(store, monkeypatch, most):
    grouped(monkeypatch, most)
    data = dataset(store, batch_size=48)
    found = [fingerprint(batch) for batch in data]
    grouped(monkeypatch, 2)
    assert found == [fingerprint(batch) for batch in dataset(store, batch_size=48)]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_state_at_any_step_goes_on_there(store, shuffle):
    options = {"shuffle": shuffle, "batch_size": 100, "seed": 3}
    data = dataset(store, **options)
    data.set_epoch(2)
    states, found = [data.state_dict()], []
    for batch in data:
        # Others have been fetched by now: they are not what it describes.
        states.append(data.state_dict())
        assert states[-1] == batch.state
        found.append(fingerprint(batch))
    following = [fingerprint(batch) for batch in data]
    for step, state in enumerate(states):
        other = dataset(store, **options)
        other.load_state_dict(state)
        assert other.state_dict() == state
        other.set_epoch(2)
        assert [fingerprint(batch) for batch in other] == found[step:]
        assert other.epoch == 3
        assert [fingerprint(batch) for batch in other] == following


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(5, 200), st.integers(0, 6)), max_size=4),
    st.sampled_from(SHUFFLES),
)
def test_resumed_with_other_ranks_what_is_left_comes_once(store, changes, shuffle):
    seen, state = [], None
    for ranks, size, steps in [*changes, (1, 100, 1000)]:
        shares = [
            dataset(store, rank=rank, world_size=ranks, batch_size=size, shuffle=shuffle) for rank in range(ranks)
        ]
        if state is not None:
            for share in shares:
                share.load_state_dict(state)
        for batches in zip(*(itertools.islice(share, steps) for share in shares), strict=True):
            seen += positions(batches)
        states = [share.state_dict() for share in shares]
        assert all(one == states[0] for one in states)
        state = states[0]
        if state["epoch"]:
            break
    assert seen == positions(dataset(store, batch_size=100, shuffle=shuffle))


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 2), (4, 2), (3, 3), (3, 2), (6, 3)])
def test_machines_have_blocks_of_their_own_and_every_token_comes_once(store, ranks, nodes):
    options = {"shuffle": "block", "drop": (), "nodes": nodes}
    shares = [dataset(store, rank=rank, world_size=ranks, batch_size=20, **options) for rank in range(ranks)]
    block = shares[0]._plan.blocks.tokens
    for epoch in range(2):
        found = [list(share) for share in shares]
        assert len({len(batches) for batches in found}) == 1
        assert sorted(at for batches in found for at in positions(batches)) == list(range(store.n_tokens))
        blocks = [{at // block for at in positions(batches[:-2])} for batches in found]
        alone = [set.union(*blocks[node * ranks // nodes : (node + 1) * ranks // nodes]) for node in range(nodes)]
        if ranks % nodes == 0:
            # One that the border of two lanes parts, at most.
            assert all(len(one & other) <= 1 for one, other in itertools.combinations(alone, 2))
        # At any time as many pools are mixed as there are machines.
        assert shares[0].shuffle_quality > dataset(store, shuffle="block", drop=()).shuffle_quality
        assert {share.epoch for share in shares} == {epoch + 1}


def test_resumed_on_other_machines_an_epoch_is_finished_as_it_began(store):
    def made(ranks, nodes):
        options = {"world_size": ranks, "nodes": nodes, "shuffle": "block", "batch_size": 24 // ranks}
        return [dataset(store, rank=rank, **options) for rank in range(ranks)]

    def steps(shares, count=10**6):
        batches = zip(*(itertools.islice(share, count) for share in shares), strict=True)
        return [sorted(positions(step)) for step in batches]

    several, one, three = made(4, 2), made(1, 1), made(3, 3)
    whole = steps(made(4, 2))
    begun = steps(several, 7)
    state = several[0].state_dict()
    assert (state["lanes"], state["step"]) == (2, 7)
    assert all(share.state_dict() == state for share in several)
    one[0].load_state_dict(state)
    begun += steps(one, 5)
    for share in three:
        share.load_state_dict(one[0].state_dict())
    # Step by step the very tokens, but for how the rest at the end is shared.
    rest = steps(three)
    assert (begun + rest)[:-2] == whole[:-2]
    assert sorted(itertools.chain(*begun, *rest)) == sorted(itertools.chain(*whole))
    # The next epoch is in lanes of the machines that there are now.
    assert {share.state_dict()["lanes"] for share in three} == {3}
    assert steps(three) == steps([share for share in made(3, 3) if share.set_epoch(1) is None])


def test_where_the_ranks_are_is_found(store, monkeypatch):
    def lanes(ranks=4, **options):
        return dataset(store, rank=0, world_size=ranks, shuffle="block", **options).state_dict()["lanes"]

    for names in (("WORLD_SIZE", "GROUP_WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")):
        assert lanes() == 1
        with monkeypatch.context() as patch:
            patch.setenv(names[0], "4")
            assert lanes() == 1
            patch.setenv(names[1], "2")
            assert (lanes(), lanes(nodes=4)) == (2, 4)
            # These are not the ranks that it started.
            assert lanes(ranks=2) == 1
            for odd, found in (("", 1), ("0", 1), ("-3", 1), ("two", 1), ("9", 4)):
                patch.setenv(names[1], odd)
                assert lanes() == found
    # Only blocks are dealt out.
    assert dataset(store, rank=0, world_size=4, nodes=2).state_dict()["lanes"] == 1
    with pytest.raises(mmcache.ArgumentError, match="nodes is 5: expected a whole number from 1 to 4"):
        lanes(nodes=5)


def test_a_state_of_another_order_is_refused(store):
    state = dataset(store, seed=1).state_dict()
    with pytest.raises(mmcache.ArgumentError, match="seed is 1, here 2"):
        dataset(store, seed=2).load_state_dict(state)
    with pytest.raises(mmcache.ArgumentError, match="kept is"):
        dataset(store, seed=1, drop="bos").load_state_dict(state)
    blocks = dataset(store, shuffle="block").state_dict()
    with pytest.raises(mmcache.ArgumentError, match="block_tokens is 4, here 8"):
        dataset(store, shuffle="block", buffer_bytes=2 * SMALL).load_state_dict(blocks)
    # Other layers, a dtype or a device make no other order.
    dataset(store, seed=1, layers=[0], dtype="float32", sites=["wide"]).load_state_dict(state)


def test_which_epoch_an_iteration_is_of(store):
    data = dataset(store)
    epochs = [positions(data) for _ in range(3)]
    data = dataset(store)
    # Broken off: it begins anew.
    assert positions(itertools.islice(data, 3)) == epochs[0][: 3 * 64]
    assert (data.epoch, data.state_dict()["step"]) == (0, 3)
    data.set_epoch(0)
    assert positions(data) == epochs[0]
    # Where an epoch is set in the middle of another, what goes on is not followed.
    batches = iter(data)
    next(batches)
    data.set_epoch(2)
    assert len(positions(batches)) == len(epochs[1]) - 64
    assert data.state_dict()["epoch"] == 2
    assert data.state_dict()["step"] == 0
    assert positions(data) == epochs[2]
    # The last batch of an epoch, before the loop knows that it is.
    batches = iter(dataset(store))
    for batch in itertools.islice(batches, len(data)):
        last = batch.state
    data.load_state_dict(last)
    assert positions(data) == []
    assert positions(data) == epochs[1]
    with pytest.raises(mmcache.ArgumentError, match="epoch is -1"):
        data.set_epoch(-1)


def test_iterations_at_once_do_not_disturb_each_other(store):
    data, expected = dataset(store), positions(dataset(store))
    one, two = iter(data), iter(data)
    first = [next(one) for _ in range(3)]
    second = [next(two)]
    assert data.state_dict()["step"] == 1
    first += list(one)
    assert data.state_dict() == second[-1].state
    second += list(two)
    assert positions(first) == positions(second) == expected
    results = {}
    workers = [
        threading.Thread(target=lambda number=number: results.update({number: positions(iter_of(data))}))
        for number in range(3)
    ]
    data.set_epoch(0)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3


def iter_of(data):
    return list(iter(data))


def test_blocks_are_read_ahead_once_and_in_order(store, monkeypatch):
    reads, lock, real = [], threading.Lock(), SiteView.read_ahead

    def record(self, start, stop):
        real(self, start, stop)
        with lock:
            reads.append((self.name, start, stop))

    monkeypatch.setattr(SiteView, "read_ahead", record)
    data = dataset(store, shuffle="block", batch_size=20, drop=())
    assert data._plan.blocks == (4, 10)
    order, needed = data._plan.order(data._position), set()
    for number, batch in enumerate(data):
        there = {(site, at) for site, start, stop in reads for at in range(start, stop)}
        assert {(site, at) for site in SITES for at in batch.positions.tolist()} <= there
        needed.update(batch.positions.tolist())
        # Those that are fetched ahead may be in the pool behind, and the one behind that is read then.
        last = order.pool(min((number + 1 + data._ahead) * 20, data.n_tokens) - 1)
        assert len(there) <= 2 * 4 * 10 * (last + 2)
    covered = sorted((site, at) for site, start, stop in reads for at in range(start, stop))
    assert covered == sorted((site, at) for site in SITES for at in range(store.n_tokens))
    assert max(stop - start for _, start, stop in reads) == 4


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 2)])
def test_ranks_of_a_machine_begin_at_different_blocks_of_a_pool(store, monkeypatch, ranks, nodes):
    reads = []
    monkeypatch.setattr(SiteView, "read_ahead", lambda self, start, stop: reads.append((self.name, start, stop)))
    firsts = []
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks, "nodes": nodes, "shuffle": "block", "drop": ()}
        data = dataset(store, batch_size=10, **options)
        reads.clear()
        next(iter(data))
        assert_quiet()
        order = data._plan.order(data._position)
        lane = rank * nodes // ranks
        blocks = order.blocks(order.pool(order.lanes.begin(lane)))
        # Of this pool; batches that are fetched ahead may have asked for later ones before.
        pool = [(start, stop) for _, start, stop in reads if (start, stop) in blocks]
        # All of it, whoever begins where.
        assert set(pool) == set(blocks)
        firsts.append(pool[0])
        assert firsts[-1] == blocks[len(blocks) * (rank % 2) // 2]
    assert len(set(firsts)) == ranks


def test_an_error_in_reading_ahead_is_raised(store, monkeypatch):
    def fail(*_):
        raise mmcache.IncompleteError("not there yet")

    monkeypatch.setattr(SiteView, "read_ahead", fail)
    with pytest.raises(mmcache.IncompleteError, match="not there yet"):
        list(dataset(store, shuffle="block"))
    assert_quiet()


def test_a_pickled_one_goes_on_where_it_was(store):
    data = dataset(store, split="train", drop=leaving(store, 700), normalize="per_dim", seed=9)
    found = []
    for batch in itertools.islice(data, 3):
        found.append(fingerprint(batch))
        state = batch.state
    data.load_state_dict(state)
    data.extra = list(data._buffers[0]._idle)
    del data.extra
    text = pickle.dumps(data)
    assert len(text) < 60_000
    other = pickle.loads(text)  # noqa: S301 -- our own
    assert other.store is not store
    assert repr(other) == repr(data)
    rest = [fingerprint(batch) for batch in data]
    assert [fingerprint(batch) for batch in other] == rest
    alike = dataset(store, split="train", drop=leaving(store, 700), normalize="per_dim", seed=9)
    assert found + rest == [fingerprint(batch) for batch in alike]


@FORKS
def test_a_fork_in_the_middle_of_an_epoch(store):
    data = dataset(store, shuffle="block", batch_size=16)
    expected = [fingerprint(batch) for batch in data]
    data.set_epoch(0)
    batches = iter(data)
    held = next(batches)

    def work():
        # It has its own threads, maps and memory; those of the parent are not there.
        with pytest.raises(mmcache.ClosedError, match="another process"):
            next(batches)
        assert [fingerprint(batch) for batch in data] == expected
        held["wide"].zero_()

    assert forked(work) == 0
    assert [fingerprint(held), *map(fingerprint, batches)] == expected


def test_rank_and_world_size_are_found(store, monkeypatch):
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    found = positions(dataset(store))
    assert positions(dataset(store, rank=0, world_size=1)) != found
    monkeypatch.undo()
    assert positions(dataset(store, rank=1, world_size=3)) == found
    assert dataset(store).state_dict()["world_size"] == 1


def test_what_it_says_of_itself(store):
    data = dataset(store, sites=["narrow"], layers=[1, 0], drop=())
    assert repr(data) == (
        f"ActivationDataset({str(store.path)!r}, sites=['narrow'], n_tokens=1009, batches=16 of 64, shuffle='global')"
    )
    assert (data.sites, data.layers, data.n_tokens, data.epoch, data.store) == (("narrow",), (1, 0), 1009, 0, store)
    assert (dataset(store).sites, dataset(store).layers) == (store.sites, store.layers)
    assert data.shuffle_quality == 1.0
    assert dataset(store, shuffle=None).shuffle_quality < 0.01
    assert 0.01 < dataset(store, shuffle="block").shuffle_quality < 0.5
    # Every piece is as long as one pool: a uniform shuffle.
    assert dataset(store, shuffle="block", buffer_bytes=1 << 30).shuffle_quality > 0.99
    assert isinstance(iter(data), BatchIterator)
    assert data._position == Position(0, 0, 0, 1)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"batch_size": 0}, mmcache.ArgumentError, "batch_size is 0"),
        ({"batch_size": 2.0}, mmcache.ArgumentError, r"batch_size is 2\.0"),
        ({"batch_size": True}, mmcache.ArgumentError, "batch_size is True"),
        ({"shuffle": True}, mmcache.ArgumentError, "shuffle is True: expected 'global' or 'block' or None"),
        ({"shuffle": "blocks"}, mmcache.ArgumentError, "'blocks'"),
        ({"seed": -1}, mmcache.ArgumentError, "seed is -1"),
        ({"seed": 2**64}, mmcache.ArgumentError, "seed is 18446744073709551616"),
        ({"normalize": "layer"}, mmcache.ArgumentError, "normalize is 'layer'"),
        ({"split": "test"}, mmcache.ArgumentError, "split is 'test'"),
        ({"drop_last": "no"}, mmcache.ArgumentError, "drop_last is 'no'"),
        ({"drop": "pad"}, mmcache.ArgumentError, "'pad'"),
        ({"sites": "wide"}, mmcache.ArgumentError, "sites is the string 'wide': expected a list"),
        ({"sites": []}, mmcache.ArgumentError, r"sites is \(\)"),
        ({"sites": ["wide", "wide"]}, mmcache.ArgumentError, "each once"),
        ({"sites": ["width"]}, mmcache.UnknownSiteError, "'width'"),
        ({"layers": []}, mmcache.ArgumentError, r"layers is \(\)"),
        ({"layers": [3]}, mmcache.OutOfRangeError, "layer 3"),
        ({"layers": [0.5]}, mmcache.ArgumentError, r"0\.5"),
        ({"dtype": torch.int32}, mmcache.DtypeError, "int32"),
        ({"dtype": "float8"}, mmcache.DtypeError, "float8"),
        ({"device": "gpu"}, mmcache.ArgumentError, "device is 'gpu'"),
        ({"device": "cuda:99"}, mmcache.ArgumentError, "which this machine does not have"),
        ({"rank": 0}, mmcache.ArgumentError, "both of them, or neither"),
        ({"world_size": 2}, mmcache.ArgumentError, "both of them, or neither"),
        ({"rank": 2, "world_size": 2}, mmcache.ArgumentError, "rank is 2: expected a whole number from 0 to 1"),
        ({"rank": 0, "world_size": 0}, mmcache.ArgumentError, "world_size is 0"),
        ({"buffer_bytes": 0}, mmcache.ArgumentError, "buffer_bytes is 0"),
        ({"buffer_bytes": 10, "shuffle": "block"}, mmcache.ArgumentError, "the 336 bytes of one token"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(store, options, error, said):
    with pytest.raises(error, match=said):
        dataset(store, **options)


def test_a_path_is_no_store(store):
    with pytest.raises(mmcache.ArgumentError, match=r"store is a PosixPath: expected what mmcache\.open gives"):
        mmcache.ActivationDataset(store.path, batch_size=1)


def test_numbers_of_any_kind_will_do(store):
    data = dataset(store, batch_size=np.int64(50), seed=np.uint8(3), layers=torch.tensor([0, 1]))
    assert data.layers == (0, 1)
    assert type(data.state_dict()["seed"]) is type(data.state_dict()["batch_size"]) is int
