"""What a resume compares, and what a plan may become: longer, or given more sites, as if planned so at once."""

import contextlib
import copy
import importlib
import json
import platform
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch

import mmcache
from mmcache.errors import (
    ArgumentError,
    CorpusError,
    CorruptError,
    DiskFullError,
    IncompleteError,
    MmcacheError,
    PlanMismatchError,
    ReadOnlyError,
    StoreExistsError,
)
from mmcache.extraction import missing_shards, tokenization
from mmcache.system import atomic
from mmcache.system.locks import FolderLock

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")
pytestmark = pytest.mark.usefixtures("one_thread_without_syncing")

# Of many lengths, so that contexts, batches and shards end at odd places.
TEXTS = [f"text number {number}: " + "abcdefgh " * (number * 7 % 11) for number in range(14)]
SETTINGS = {
    "sites": ("mlp_in", "mlp_out"),
    "context_length": 16,
    "batch_size": 3,
    "dtype": torch.bfloat16,
    "layout": "token",
    "shard_tokens": 64,
    "max_tokens": 400,
}


class Crash(BaseException):
    """An end that nobody expects, so nobody may catch it."""


def extract(path, *, model=None, tokenizer=None, texts=TEXTS, **changes):
    model, tokenizer = model or small.llama(), tokenizer or small.byte_tokenizer()
    return mmcache.extract(model, tokenizer, texts, path, **SETTINGS | changes)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    path, before = tmp_path_factory.mktemp("plan") / "complete", torch.get_num_threads()
    torch.set_num_threads(1)
    extract(path)
    torch.set_num_threads(before)
    return path


def copied(store, path, *, without=()):
    shutil.copytree(store, path)
    for name in without:
        (path / name).unlink()
    return path


@pytest.fixture
def begun(complete, tmp_path):
    """A store with a shard of each site missing."""
    return copied(complete, tmp_path / "begun", without=["mlp_in/c.0.3.0", "mlp_out/c.0.3.0"])


def refused(path, message, **changes):
    before = small.identities(path)
    with pytest.raises(PlanMismatchError, match=message) as found:
        extract(path, **changes)
    assert small.identities(path) == before
    assert str(path) in str(found.value)
    return str(found.value)


def with_another_token():
    tokenizer = copy.deepcopy(small.byte_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    return tokenizer


def changed_text(number, text):
    return [*TEXTS[:number], text, *TEXTS[number + 1 :]]


# field → what a resume gives otherwise
IDENTITY = {
    "model": lambda: {"model": small.gpt2()},
    "weights": lambda: {"model": small.llama(seed=1)},
    "compute_dtype": lambda: {"model": small.llama().to(torch.float64)},
    "tokenizer": lambda: {"tokenizer": with_another_token()},
    "layers": lambda: {"layers": [0, 2]},
    "context_length": lambda: {"context_length": 17},
    "pack": lambda: {"pack": True},
    "dtype": lambda: {"dtype": torch.float16},
    "layout": lambda: {"layout": "layer"},
    "shard_tokens": lambda: {"shard_tokens": 128},
    "max_tokens": lambda: {"max_tokens": 399},
}


@pytest.mark.parametrize("field", IDENTITY)
def test_a_resume_with_another_identity_is_refused(begun, field):
    message = refused(begun, rf"(?m)^  {field} .* in the store, .* now$", **IDENTITY[field]())
    assert "Give the settings of the store, or choose another path." in message
    extract(begun)  # and with its own settings it goes on


def test_a_refusal_lists_every_field_that_differs_and_no_other(begun):
    message = refused(begun, "was planned with another identity", layout="layer", pack=True, context_length=20)
    fields = re.findall(r"(?m)^  (\w+) ", message)
    assert sorted(fields) == ["context_length", "layout", "pack"]
    assert re.search(r"(?m)^  context_length +16 in the store, 20 now$", message)


@pytest.mark.parametrize(
    "sites", [("mlp_in",), ("mlp_in", "mlp_out", "resid_post"), ("mlp_in", "resid_post"), ("resid_post",)]
)
def test_a_resume_with_other_sites_is_refused_until_the_store_is_complete(begun, sites):
    message = refused(begun, r"(?m)^  sites +\[\"mlp_in\", \"mlp_out\"\] in the store, ", sites=sites)
    assert "More sites can be added once it is complete." in message


@pytest.mark.parametrize(
    "texts",
    [changed_text(3, "another text"), [TEXTS[1], TEXTS[0], *TEXTS[2:]], TEXTS[:5], [], ["", *TEXTS]],
    ids=["text", "order", "shorter", "none", "one more in front"],
)
def test_a_resume_with_another_corpus_is_refused(begun, texts):
    refused(begun, r"was planned with another corpus: its first \d+ documents hash to", texts=texts)


def test_a_corpus_that_was_used_up_may_not_be_longer(tmp_path):
    extract(tmp_path / "store", max_tokens=None)
    refused(tmp_path / "store", "and more are given now", texts=[*TEXTS, "more"], max_tokens=None)


def test_a_plan_of_the_whole_corpus_cannot_be_cut_short(tmp_path):
    extract(tmp_path / "store", max_tokens=None)
    refused(tmp_path / "store", r"max_tokens +null in the store, 400 now")


def test_sites_come_in_any_order(complete, tmp_path):
    path = copied(complete, tmp_path / "store", without=["mlp_in/c.0.3.0"])
    extract(path, sites=("mlp_out", "mlp_in"))
    small.assert_same_store(path, complete)


def test_identity_is_compared_while_the_plan_is_not_finished_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 100)

    def texts():
        yield from TEXTS[:12]
        raise Crash

    with pytest.raises(Crash):
        extract(tmp_path / "store", texts=texts())
    with pytest.raises(IncompleteError, match="is still being planned"):
        mmcache.open(tmp_path / "store", partial=True)
    refused(tmp_path / "store", "layout", layout="layer")
    extract(tmp_path / "store")


def other_numerics(monkeypatch, field):
    """Change what a field is read from; for some of them that is an argument."""
    if field == "batch_size":
        return {"batch_size": 4}
    if field == "attention":
        return {"model": small.llama(attn_implementation="eager")}
    if field == "threads":
        torch.set_num_threads(2)
    elif field == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    elif field == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "another")
    elif field == "torch":
        monkeypatch.setattr(torch, "__version__", "another")
    elif field == "transformers":
        monkeypatch.setattr(sys.modules["transformers"], "__version__", "another")
    else:
        # There is one kind of device in this machine.
        module = importlib.import_module("mmcache.extraction.job")
        real = module.numerics
        monkeypatch.setattr(module, "numerics", lambda *given: {**real(*given), field: "another"})
    return {}


NUMERICS = (
    "batch_size", "attention", "device", "processor", "threads", "torch", "transformers", "machine", "autocast",
    "float32_matmul_precision", "tf32", "deterministic", "cuda", "cudnn", "activations",
)  # fmt: skip


def test_every_numeric_is_tested(complete):
    assert set(mmcache.open(complete).source["numerics"]) == set(NUMERICS)


@pytest.mark.parametrize("field", NUMERICS)
def test_a_resume_with_other_numerics_is_refused_or_accepted_and_recorded(begun, monkeypatch, field):
    with monkeypatch.context() as patched:
        changes = other_numerics(patched, field)
        message = refused(begun, rf"(?m)^  {field} .* in the store, .* now$", **changes)
        assert "--accept-numerics (accept_numerics=True), which is recorded" in message
        store = extract(begun, **changes, accept_numerics=True)
        assert store.source["numerics"][field] != store.source["accepted"][0][field]
        assert len(store.source["accepted"]) == 1
        # What was accepted once needs no flag again; nothing is left to do either.
        before = small.identities(begun)
        extract(begun, **changes)
        assert small.identities(begun) == before
        assert json.loads((begun / "zarr.json").read_text())["attributes"]["mmcache"]["source"]["accepted"]
    if field == "threads":
        torch.set_num_threads(1)
    extract(begun)
    refused(begun, "batch_size", batch_size=7)


def test_nothing_is_accepted_that_does_not_differ(complete, tmp_path):
    path = copied(complete, tmp_path / "store")
    before = small.identities(path)
    assert extract(path, accept_numerics=True).source["accepted"] == []
    assert small.identities(path) == before


# (batch_size, shard_tokens, max_tokens before, max_tokens after)
GROWTHS = [
    (1, 64, 300, 500),
    (3, 64, 300, 301),
    (3, 64, 20, 500),
    (4, 128, 300, None),
    (50, 64, 500, None),
    (3, None, 300, 500),
    (5, None, 100, None),
]


@pytest.mark.parametrize("layout", ["token", "layer"])
@pytest.mark.parametrize(("batch_size", "shard_tokens", "one", "two"), GROWTHS)
def test_a_store_that_grew_equals_one_made_at_once(tmp_path, layout, batch_size, shard_tokens, one, two):
    settings = {"layout": layout, "batch_size": batch_size, "shard_tokens": shard_tokens}
    before = extract(tmp_path / "grown", **settings, max_tokens=one)
    touched = small.identities(tmp_path / "grown")
    store = extract(tmp_path / "grown", **settings, max_tokens=two)
    assert store.n_tokens > before.n_tokens or two == one + 1
    extract(tmp_path / "once", **settings, max_tokens=two)
    small.assert_same_store(tmp_path / "grown", tmp_path / "once")
    if shard_tokens is None or store.n_tokens == before.n_tokens:
        return
    # What was run in whole batches is kept, in whole shards. A batch that the plan's end cut short is another now,
    # which may change the last bits, even where on this machine it does not.
    whole = before.n_sequences // batch_size * batch_size
    edge = before.sequences[whole].start if whole < before.n_sequences else before.n_tokens
    after = small.identities(tmp_path / "grown")
    blocks = {name: int(name.split(".")[2]) for name in touched if name.startswith("mlp") and "/c." in name}
    kept = {name for name in blocks if after[name] == touched[name]}
    assert kept == {name for name, block in blocks.items() if (block + 1) * shard_tokens <= edge}


def test_a_store_grows_again_and_again(tmp_path):
    for most in (50, 51, 130, 400, 401, None):
        extract(tmp_path / "grown", max_tokens=most)
    extract(tmp_path / "once", max_tokens=None)
    small.assert_same_store(tmp_path / "grown", tmp_path / "once")


def test_growing_an_incomplete_store_fills_it_too(begun, tmp_path):
    extract(begun, max_tokens=None)
    extract(tmp_path / "once", max_tokens=None)
    small.assert_same_store(begun, tmp_path / "once")


def test_batches_of_accepted_numerics_are_made_again_too(begun, tmp_path):
    # Shard 3 was made with batches of 4: those that were cut short by the end of the plan are not what a longer
    # plan has, whichever of the two sizes made them.
    extract(begun, batch_size=4, accept_numerics=True)
    first = mmcache.open(begun)
    store = extract(begun, batch_size=4, max_tokens=None)
    once = extract(tmp_path / "once", batch_size=4, max_tokens=None)
    block = first.n_tokens // 64 * 64
    for site in store.sites:
        assert torch.equal(store[site][1, block:], once[site][1, block:])


class Writes:
    """Counts the files that are put in place, and crashes after one of them."""

    def __init__(self, monkeypatch):
        self.done, self.crash_at = 0, None
        publish = atomic.AtomicFile.publish

        def counted(draft, size, **options):
            publish(draft, size, **options)
            self.done += 1
            if self.done == self.crash_at:
                raise Crash

        monkeypatch.setattr(atomic.AtomicFile, "publish", counted)

    def crash(self, number, call):
        """Run until file number `number`; tell whether it came that far."""
        self.done, self.crash_at = 0, number
        # What the pipeline's threads meet comes out as an error of ours.
        with contextlib.suppress(Crash, MmcacheError):
            call()
        self.crash_at = None
        return self.done >= number


@pytest.mark.parametrize("most", [500, None])
def test_growth_that_is_interrupted_anywhere_goes_on(tmp_path, monkeypatch, request, most):
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 150)
    extract(tmp_path / "once", max_tokens=most, shard_tokens=128)
    extract(tmp_path / "before", max_tokens=300, shard_tokens=128)
    writes, number = Writes(monkeypatch), 0
    while True:
        # Planning is the first twenty or so; the shards behind it are all alike.
        number += 1 if number < 20 or request.config.getoption("--slow") else 5
        path = copied(tmp_path / "before", tmp_path / f"{number}")
        reached = writes.crash(number, lambda: extract(path, max_tokens=most, shard_tokens=128))  # noqa: B023
        if not reached:
            break
        store = extract(path, max_tokens=most, shard_tokens=128)
        assert store.n_tokens > 300
        small.assert_same_store(path, tmp_path / "once")
        shutil.rmtree(path)
    assert number > 20


def test_growth_that_was_interrupted_may_be_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 100)
    before = extract(tmp_path / "store")
    tokens = before.tokens.clone()

    def texts():
        yield from TEXTS
        raise Crash

    with pytest.raises(Crash):
        extract(tmp_path / "store", texts=texts(), max_tokens=None)
    store = extract(tmp_path / "store")
    assert torch.equal(store.tokens, tokens)
    assert store.n_sequences == before.n_sequences
    extract(tmp_path / "store", max_tokens=None)
    extract(tmp_path / "once", max_tokens=None)
    small.assert_same_store(tmp_path / "store", tmp_path / "once")


@pytest.mark.parametrize("layout", ["token", "layer"])
@pytest.mark.parametrize("asked", [("resid_post", "attn_out"), ("mlp_in", "resid_post", "mlp_out", "attn_out")])
def test_sites_that_are_added_later_equal_those_made_at_once(tmp_path, layout, asked):
    extract(tmp_path / "added", layout=layout)
    shards = {name: found for name, found in small.identities(tmp_path / "added").items() if "/c." in name}
    store = extract(tmp_path / "added", layout=layout, sites=asked)
    sites = ("mlp_in", "mlp_out", "resid_post", "attn_out")
    assert set(store.sites) == set(sites)
    once = extract(tmp_path / "once", layout=layout, sites=sites)
    for array in (*sites, "tokens", "flags", "sequences", "statistics"):
        assert small.contents(tmp_path / "added" / array) == small.contents(tmp_path / "once" / array)
    assert store.source["modules"] == once.source["modules"]
    after = small.identities(tmp_path / "added")
    assert all(after[name] == found for name, found in shards.items())
    # The command that added them may be given again, and so may the one before it.
    for again in (asked, SETTINGS["sites"], sites):
        extract(tmp_path / "added", layout=layout, sites=again)
        assert small.identities(tmp_path / "added") == after


def test_adding_sites_that_is_interrupted_anywhere_goes_on_with_the_same_command(complete, tmp_path, monkeypatch):
    once = copied(complete, tmp_path / "once")
    extract(once, sites=("resid_post",))
    writes, number = Writes(monkeypatch), 0
    while True:
        number += 1
        path = copied(complete, tmp_path / f"{number}")
        reached = writes.crash(number, lambda: extract(path, sites=("resid_post",)))  # noqa: B023 -- called at once
        if not reached:
            break
        extract(path, sites=("resid_post",))
        small.assert_same_store(path, once)
        shutil.rmtree(path)
    assert number > 10


def test_a_site_that_is_being_added_must_be_finished_first(complete, tmp_path):
    path = copied(complete, tmp_path / "store")
    extract(path, sites=("resid_post",))
    (path / "resid_post" / "c.0.2.0").unlink()
    refused(path, "sites", sites=("mlp_in", "mlp_out"))
    refused(path, "sites", sites=("resid_post", "attn_out"))
    extract(path, sites=("resid_post",))
    extract(path, sites=("mlp_in", "mlp_out", "resid_post"))


@pytest.mark.parametrize("sites", [("resid_post",), ("mlp_in",), ("mlp_in", "mlp_out", "resid_post")])
def test_a_store_does_not_grow_and_change_its_sites_at_once(complete, tmp_path, sites):
    path = copied(complete, tmp_path / "store")
    message = refused(path, "sites", sites=sites, max_tokens=500)
    assert "It can grow with the sites that it has, and be given others after that." in message
    extract(path, max_tokens=500)
    extract(path, max_tokens=500, sites=("mlp_in", "mlp_out", "resid_post"))


def test_a_site_cannot_take_a_name_that_something_else_has(complete, tmp_path):
    path = copied(complete, tmp_path / "store")
    for name in ("mine", "zarr.json"):
        (path / "resid_post").mkdir()
        (path / "resid_post" / name).write_text("x")
        refused(path, "already holds resid_post, which is no site of it: move it away", sites=("resid_post",))
        shutil.rmtree(path / "resid_post")
    (path / "resid_post").write_text("x")
    refused(path, "already holds resid_post", sites=("resid_post",))
    assert extract(path).sites == ("mlp_in", "mlp_out")


def shard_names(path):
    return sorted(str(file.relative_to(path)) for site in path.glob("mlp*") for file in site.glob("c.*"))


def test_a_job_that_does_not_fit_is_refused_with_the_numbers(complete, tmp_path, monkeypatch):
    path = tmp_path / "store"
    needed = sum((complete / name).stat().st_size for name in shard_names(complete))
    monkeypatch.setattr(missing_shards, "free_bytes", lambda _: needed - 1)
    with pytest.raises(DiskFullError, match=rf"take {needed} bytes .* and {needed - 1} .* are free: make room"):
        extract(path)
    assert shard_names(path) == []
    monkeypatch.setattr(missing_shards, "free_bytes", lambda _: needed)
    extract(path)
    small.assert_same_store(path, complete)


def test_a_resume_needs_room_for_what_is_missing_only(begun, monkeypatch):
    files = [begun / "mlp_in/c.0.2.0", begun / "mlp_out/c.0.2.0"]  # as large as those that are missing
    needed = sum(file.stat().st_size for file in files)
    monkeypatch.setattr(missing_shards, "free_bytes", lambda _: needed - 1)
    before = small.contents(begun)
    with pytest.raises(DiskFullError, match=f"take {needed} bytes"):
        extract(begun)
    assert small.contents(begun) == before
    monkeypatch.setattr(missing_shards, "free_bytes", lambda _: needed)
    extract(begun)


@pytest.mark.parametrize("shard_tokens", [64, None])
def test_growth_that_does_not_fit_leaves_the_store_complete(tmp_path, monkeypatch, shard_tokens):
    path = tmp_path / "store"
    before = extract(path, shard_tokens=shard_tokens)
    rows, shards = before["mlp_in"][1, :].clone(), shard_names(path)
    once = extract(tmp_path / "once", shard_tokens=shard_tokens, max_tokens=None)

    def sizes(path, names):
        return sum((path / name).stat().st_size for name in names)

    disk = 0
    monkeypatch.setattr(missing_shards, "free_bytes", lambda _: disk - sizes(path, shard_names(path)))
    with pytest.raises(DiskFullError, match="make room"):
        extract(path, shard_tokens=shard_tokens, max_tokens=None)
    store = mmcache.open(path)
    assert torch.equal(store["mlp_in"][1, :], rows)
    assert shard_names(path) == shards
    disk = sizes(path, shards)
    extract(path, shard_tokens=shard_tokens)  # the job of before may still be asked for

    # Shards that are made anew, the last one at least, first give their own room back.
    disk = sizes(once.path, shard_names(once.path)) - 1
    with pytest.raises(DiskFullError, match="make room"):
        extract(path, shard_tokens=shard_tokens, max_tokens=None)
    disk += 1
    extract(path, shard_tokens=shard_tokens, max_tokens=None)
    small.assert_same_store(path, once.path)


def test_sites_that_do_not_fit_leave_the_store_complete(complete, tmp_path, monkeypatch):
    path = copied(complete, tmp_path / "store")
    monkeypatch.setattr(missing_shards, "free_bytes", lambda _: 100)
    before = small.contents(path)
    with pytest.raises(DiskFullError, match="and 100 "):
        extract(path, sites=("resid_post",))
    assert small.contents(path) == before
    assert mmcache.open(path).sites == ("mlp_in", "mlp_out")


def test_shards_of_an_odd_size_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ArgumentError, match=r"shard_tokens is 65, .* the nearest good number is 64"):
        extract(tmp_path / "store", shard_tokens=65)
    assert not (tmp_path / "store").exists()


def test_a_path_that_is_taken_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreExistsError, match="that is a file"):
        extract(tmp_path / "file")
    (tmp_path / "folder" / "tokens").mkdir(parents=True)
    with pytest.raises(StoreExistsError, match="already holds tokens"):
        extract(tmp_path / "folder")
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(CorruptError, match="is no mmcache store's"):
        extract(tmp_path / "group")
    with mmcache.create(tmp_path / "grown", sites={"mlp_in": 32}, n_layers=3) as writer:
        writer.append([1, 2], {"mlp_in": torch.zeros(3, 2, 32)})
    before = small.identities(tmp_path / "grown")
    with pytest.raises(ReadOnlyError, match="was not made by extract"):
        extract(tmp_path / "grown")
    assert small.identities(tmp_path / "grown") == before


def test_one_process_plans_at_a_time_and_the_others_find_its_plan(complete, begun, tmp_path):
    path = tmp_path / "store"
    path.mkdir()
    lock = FolderLock(path)
    waiting, found = threading.Event(), []
    job = threading.Thread(
        target=lambda: found.append(extract(path, progress=lambda at: waiting.set() if at.phase == "wait" else None))
    )
    job.start()
    assert waiting.wait(60)
    assert not found
    # What the one that plans does meanwhile is not done again.
    shutil.copytree(begun, path, dirs_exist_ok=True)
    before = small.identities(path / "tokens")
    lock.release()
    job.join(60)
    assert found[0].n_tokens == mmcache.open(complete).n_tokens
    assert small.identities(path / "tokens") == before
    small.assert_same_store(path, complete)


def test_filling_needs_no_lock(complete, begun):
    lock = FolderLock(begun)
    try:
        extract(begun)
    finally:
        lock.release()
    small.assert_same_store(begun, complete)


def test_what_killed_jobs_left_half_written_is_removed(begun):
    folders = [begun, *(begun / name for name in ("tokens", "flags", "sequences", "mlp_in", "mlp_out"))]
    # The statistics were being kept when the process died, so what is written last is not there.
    files_there = [path for path in (begun / "statistics" / "mlp_in").rglob("*") if path.is_file()]
    (begun / "statistics" / "mlp_in" / "zarr.json").unlink()
    folders += sorted({begun / "statistics", *(path.parent for path in files_there)})
    assert len(folders) > 8
    for folder in folders:
        (folder / ".zarr.json.0123abcd.tmp").write_bytes(b"{")
    # A live one holds a lock on what it is writing: here on what is there already.
    live = atomic.AtomicFile(begun, f"mlp_in/{min(path.name for path in (begun / 'mlp_in').glob('c.*'))}")
    extract(begun)
    assert [path.name for path in begun.rglob("*.tmp")] == [live._temporary]
    live.discard()


def test_a_corpus_that_breaks_off_is_gone_on_with(complete, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 50)

    def texts():
        yield from TEXTS[:10]
        raise CorpusError("line 11 is broken")

    with pytest.raises(CorpusError, match="line 11 is broken"):
        extract(tmp_path / "store", texts=texts())
    extract(tmp_path / "store")
    small.assert_same_store(tmp_path / "store", complete)


def test_documents_may_be_ids_and_a_generator(tmp_path):
    ids = [np.array(small.byte_tokenizer()(text)["input_ids"]) for text in TEXTS]
    store = extract(tmp_path / "ids", texts=iter(ids))
    assert (store.tokens[:16].numpy() == ids[0][:16]).all()
    with pytest.raises(PlanMismatchError, match="another corpus"):
        extract(tmp_path / "ids")  # the same tokens, but they came as text
