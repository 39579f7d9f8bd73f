"""Under torch's DataLoader and torchdata's StatefulDataLoader: the batches of one process, and resumed at any step."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import mmcache
from dataset_feeds import SMALL, check, fingerprint, make_shared, make_store, positions
from stores_and_processes import python

# torchdata calls what torch no longer likes, and torch counts this machine's processors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

SHUFFLES = ("global", "block", None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_shared(tmp_path_factory.mktemp("loaders"))


def dataset(store, **options):
    return mmcache.ActivationDataset(store, **{"batch_size": 200, "seed": 3, "buffer_bytes": SMALL} | options)


def prints(batches):
    return [fingerprint(batch) for batch in batches]


def of(data, workers, kind=DataLoader, **options):
    return kind(data, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_workers_take_turns_at_the_batches_of_one_process(store, shuffle, workers):
    expected = prints(dataset(store, shuffle=shuffle))
    found = list(of(dataset(store, shuffle=shuffle), workers))
    assert prints(found) == expected
    for batch in found:
        check(batch, store)
    assert [batch.state["step"] for batch in found] == list(range(1, len(expected) + 1))


def test_more_workers_than_batches(store):
    data = dataset(store, batch_size=2000)
    assert prints(of(data, 3)) == prints(dataset(store, batch_size=2000))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_batchs_state_goes_on_at_any_step(store, shuffle, workers):
    batches = list(of(dataset(store, shuffle=shuffle), workers))
    for step, batch in enumerate(batches):
        other = dataset(store, shuffle=shuffle)
        other.load_state_dict(batch.state)
        # After the epoch's last batch comes an empty rest.
        assert prints(of(other, workers)) == prints(batches[step + 1 :])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_stateful_loader_goes_on_at_any_step(store, shuffle, workers):
    loader = of(dataset(store, shuffle=shuffle), workers, StatefulDataLoader)
    states, found = [], []
    for batch in loader:
        found.append(fingerprint(batch))
        states.append(loader.state_dict())
    assert found == prints(dataset(store, shuffle=shuffle))
    for step, state in enumerate(states[:-1]):
        other = of(dataset(store, shuffle=shuffle), workers, StatefulDataLoader)
        other.load_state_dict(state)
        assert prints(other) == found[step + 1 :]


FRESH = """
import json, sys
import mmcache
from dataset_feeds import fingerprint
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
path, jobs = sys.argv[1:]
store, found = mmcache.open(path), []
for options, workers, stateful, state in json.loads(jobs):
    data = mmcache.ActivationDataset(store, **options)
    loader = (StatefulDataLoader if stateful else DataLoader)(data, batch_size=None, num_workers=workers)
    (loader if stateful else data).load_state_dict(state)
    found.append([fingerprint(batch) for batch in loader])
print(json.dumps(found))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_in_a_fresh_process(store, workers, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"))
    jobs, expected = [], []
    for shuffle, stateful in itertools.product(SHUFFLES, (False, True)):
        options = {"batch_size": 200, "seed": 3, "buffer_bytes": SMALL, "shuffle": shuffle}
        loader = of(dataset(store, **options), workers, StatefulDataLoader if stateful else DataLoader)
        states, found = [], []
        for batch in loader:
            found.append(fingerprint(batch))
            states.append(loader.state_dict() if stateful else batch.state)
        jobs += [(options, workers, stateful, state) for state in states[:-1]]
        expected += [found[step:] for step in range(1, len(found))]
    done = python(FRESH, store.path, json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_from_two_ranks_to_three(store, shuffle, workers):
    options = {"shuffle": shuffle, "batch_size": 110}
    ranks = [list(of(dataset(store, rank=rank, world_size=2, **options), workers)) for rank in range(2)]
    everything = positions(dataset(store, **options))
    assert len(ranks[0]) == len(ranks[1])
    for step, pair in enumerate(zip(*ranks, strict=True), start=1):
        assert pair[0].state == pair[1].state
        seen = positions(itertools.chain(*(rank[:step] for rank in ranks)))
        rest = []
        for rank in range(3):
            data = dataset(store, rank=rank, world_size=3, **options)
            data.load_state_dict(pair[0].state)
            rest.append(list(of(data, workers)))
        assert len({len(one) for one in rest}) == 1
        assert sorted(seen + positions(itertools.chain(*rest))) == sorted(everything)


def test_a_workers_own_state_is_not_taken_for_another_number_of_ranks(store):
    loader = of(dataset(store, rank=0, world_size=2), 2, StatefulDataLoader)
    next(iter(loader))
    other = of(dataset(store, rank=0, world_size=3), 2, StatefulDataLoader)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(mmcache.ArgumentError, match="load the `state` of the last batch"):
        next(iter(other))


def test_persistent_workers_go_on_to_the_next_epoch(store):
    loader = of(dataset(store), 2, persistent_workers=True)
    data = dataset(store)
    for _ in range(3):
        assert prints(loader) == prints(data)


def test_spawned_workers_open_the_store_themselves(store):
    loader = of(dataset(store, split="train", normalize="per_dim"), 2, multiprocessing_context="spawn")
    assert prints(loader) == prints(dataset(store, split="train", normalize="per_dim"))


def test_an_error_in_a_worker_is_told(tmp_path):
    copy = make_store(tmp_path / "acts", [300, 200])
    data = dataset(copy, drop=())
    next((tmp_path / "acts" / "wide").glob("c.*")).write_bytes(b"no shard")
    with pytest.raises(mmcache.CorruptError, match="wide"):
        list(of(data, 2))


def test_a_worker_fetches_to_the_cpu_only(store):
    data = dataset(store)
    object.__setattr__(data._source, "device", torch.device("meta"))
    with pytest.raises(mmcache.ArgumentError, match="pin_memory=True"):
        list(of(data, 1))
