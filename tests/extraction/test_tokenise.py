"""Tokens, flags and sequences of a plan: what is stored, and going on after an interruption at any point."""

import contextlib
import gc
import os
import tracemalloc
import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mmcache.errors import CorpusError, PlanMismatchError
from mmcache.extraction import tokenization
from mmcache.extraction.tokenization import Contexts, CorpusDigest, Tokenised, check_corpus
from mmcache.format import manifest
from mmcache.format.manifest import Manifest
from mmcache.format.token_flags import BOS, FIRST, SPECIAL
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system import atomic

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")

DOCUMENTS = [
    "the first document, longer than a context",
    "",
    np.array([3, 1, 256, 4, 1, 5, 9, 2, 6], np.uint16),
    "short",
    *(f"document number {number}, " * (number % 5) for number in range(40)),
    np.array([], np.int64),
    "the last one",
]


class Crash(BaseException):
    """An end that nobody expects, so nobody may catch it."""


class Plan:
    """A store that holds its tokens only, and its root in memory."""

    def __init__(self, path, *, length=16, pack=False, uses=("first",)):
        self.path, self.length, self.pack = path, length, pack
        self.commits = []
        self.manifest = Manifest(
            kind="planned", store="s", layout="token", dtype="float32", sites={"x": 4}, layers=(0,),
            special_tokens=(256,), uses=uses,
        )  # fmt: skip

    def commit(self, state):
        self.commits.append(state)
        self.manifest = replace(self.manifest, source={"tokenised": state.to_json()})

    def tokenise(self, documents=DOCUMENTS, max_tokens=None, commit=None):
        contexts = Contexts(small.byte_tokenizer(), self.length, 257, pack=self.pack)
        commit = commit or self.commit
        state = tokenization.tokenise(self.path, self.manifest, contexts, documents, max_tokens, commit)
        commit(state)
        return state

    def column(self, array):
        state = Tokenised.of(self.manifest)
        rows = state.sequences if array == "sequences" else state.tokens
        return ShardFolder(self.path, self.manifest, array, rows).read(0, rows).numpy()


@pytest.fixture
def small_pieces(monkeypatch):
    """Commit every 150 tokens, and begin a shard every 256 rows: what takes a billion tokens happens in hundreds."""
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 150)
    monkeypatch.setattr(manifest, "_RESERVED_SHARD_ROWS", 256)
    # Slow, and nothing that a process which goes on could see.
    monkeypatch.setattr(os, "fsync", lambda _: None)


def contexts_of(documents, **options):
    length = options.pop("length", 16)
    return list(Contexts(small.byte_tokenizer(), length, 257, **options).cut(documents))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("uses", [(), ("first",)])
def test_tokens_flags_and_sequences_are_those_of_the_contexts(tmp_path, pack, uses):
    plan = Plan(tmp_path, pack=pack, uses=uses)
    state = plan.tokenise()
    contexts = contexts_of(DOCUMENTS, pack=pack)
    tokens = np.concatenate([context.tokens for context in contexts])
    np.testing.assert_array_equal(plan.column("tokens"), tokens)
    starts = np.cumsum([0, *(len(context.tokens) for context in contexts)])
    expected = [[*span, c.document] for span, c in zip(pairwise(starts), contexts, strict=True)]
    np.testing.assert_array_equal(plan.column("sequences"), expected)
    flags = plan.column("flags")
    np.testing.assert_array_equal(flags & SPECIAL != 0, tokens == 256)
    # BOS is the special token that begins a context, and no other.
    begins = np.zeros(len(tokens), np.bool_)
    begins[starts[:-1]] = True
    np.testing.assert_array_equal(flags & BOS != 0, begins & (tokens == 256))
    # Of every context, whatever it begins with, where the store flags it at all.
    np.testing.assert_array_equal(flags & FIRST != 0, begins & bool(uses))
    first = FIRST if uses else 0
    # Packed, every context begins with BOS; documents that are ids already have none.
    assert set(np.unique(flags)) == {0, SPECIAL, BOS | SPECIAL | first} | ({0} if pack else {first})

    digest = CorpusDigest()
    for document in DOCUMENTS:
        digest.add(document)
    n = len(DOCUMENTS)
    whole = Tokenised(len(tokens), len(contexts), n, documents=n, sha256=digest.hexdigest(), whole=True)
    assert state == whole == Tokenised.of(plan.manifest)
    assert len(plan.commits) > 5


class Writes:
    """Counts the files that are put in place, and crashes at one of them: before or after it has its name."""

    def __init__(self, monkeypatch, when="after"):
        self.done, self.crash_at = 0, None
        publish = atomic.AtomicFile.publish

        def counted(draft, size, **options):
            self.done += 1
            if self.done == self.crash_at and when == "before":
                raise Crash
            publish(draft, size, **options)
            if self.done == self.crash_at:
                raise Crash

        monkeypatch.setattr(atomic.AtomicFile, "publish", counted)

    def crash(self, number, call):
        self.done, self.crash_at = 0, number
        with contextlib.suppress(Crash):
            call()
        self.crash_at = None


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("pack", "max_tokens"), [(False, 777), (True, None)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_going_on_after_a_crash_at_any_write_equals_never_stopping(tmp_path, monkeypatch, pack, max_tokens, when):
    writes = Writes(monkeypatch, when)
    never = Plan(tmp_path / "never", pack=pack)
    never.tokenise(max_tokens=max_tokens)
    expected, total = small.contents(never.path), writes.done
    assert total > 15
    for number in range(1, total + 1):
        plan = Plan(tmp_path / f"{number}", pack=pack)
        # What goes on is interrupted as well.
        for again in (number, 2):
            writes.crash(again, lambda: plan.tokenise(max_tokens=max_tokens))  # noqa: B023 -- called at once
        assert plan.tokenise(max_tokens=max_tokens) == Tokenised.of(never.manifest)
        assert small.contents(plan.path) == expected


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kept", [False, True])
def test_going_on_after_a_crash_at_any_commit_equals_never_stopping(tmp_path, kept):
    never = Plan(tmp_path / "never")
    never.tokenise()
    commits = len(never.commits)
    assert commits > 5

    for number in range(commits):
        plan = Plan(tmp_path / f"{number}")

        def crash(state, plan=plan, number=number):
            # The root says so already, or not yet.
            if len(plan.commits) < number or kept:
                plan.commit(state)
            if len(plan.commits) >= number:
                raise Crash

        with pytest.raises(Crash):
            plan.tokenise(commit=crash)
        assert plan.tokenise() == Tokenised.of(never.manifest)
        assert small.contents(plan.path) == small.contents(never.path)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("pack", [False, True])
def test_a_larger_max_tokens_goes_on_to_the_same_tokens(tmp_path, pack):
    for one in (20, 150, 500):
        grown, at_once = Plan(tmp_path / f"grown-{one}", pack=pack), Plan(tmp_path / f"once-{one}", pack=pack)
        grown.tokenise(max_tokens=one)
        for most in (one + 1, one + 300):
            state = grown.tokenise(max_tokens=most)
            assert state.tokens <= most
        assert not state.whole
        assert at_once.tokenise(max_tokens=one + 300) == state
        assert small.contents(grown.path) == small.contents(at_once.path)
        at_once.tokenise()
        assert grown.tokenise().whole
        assert small.contents(grown.path) == small.contents(at_once.path)


def test_max_tokens_is_never_passed_and_cuts_no_context(tmp_path):
    lengths = np.cumsum([len(context.tokens) for context in contexts_of(DOCUMENTS)])
    for number, most in enumerate([lengths[0], lengths[4] - 1, lengths[4], lengths[4] + 1]):
        state = Plan(tmp_path / str(number)).tokenise(max_tokens=int(most))
        assert state.tokens == max(length for length in lengths if length <= most)
    state = Plan(tmp_path / "all").tokenise(max_tokens=int(lengths[-1]))
    assert (state.tokens, state.whole) == (lengths[-1], True)


def test_room_for_no_context_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="max_tokens=15 has no room for the first context: raise it, or lower"):
        Plan(tmp_path).tokenise(max_tokens=15)


@pytest.mark.parametrize("documents", [[], ["", ""], ["", np.array([], np.int32)]])
def test_a_corpus_without_tokens_is_refused(tmp_path, documents):
    with pytest.raises(CorpusError, match=rf"the corpus has no tokens \({len(documents)} documents\)"):
        Plan(tmp_path).tokenise(documents)


def changed(number, document):
    return [*DOCUMENTS[:number], document, *DOCUMENTS[number + 1 :]]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "documents",
    [
        changed(0, "another first document, not the one of before"),
        changed(2, np.array([3, 1, 256, 4, 1, 5, 9, 2, 7])),
        changed(1, DOCUMENTS[3])[:3] + changed(3, "")[3:],
        DOCUMENTS[1:],
        DOCUMENTS[:4],
        ["", *DOCUMENTS],
        [],
    ],
    ids=["text", "ids", "order", "without the first", "shorter", "one more in front", "none"],
)
def test_a_corpus_that_changed_in_what_was_used_is_refused(tmp_path, documents):
    plan = Plan(tmp_path)
    plan.tokenise(max_tokens=400)
    before = small.contents(tmp_path)
    for most in (None, 500):
        with pytest.raises(PlanMismatchError, match=r"was planned with another corpus: its first \d+ documents hash"):
            plan.tokenise(documents, max_tokens=most)
    with pytest.raises(PlanMismatchError, match="was planned with another corpus"):
        check_corpus(tmp_path, Tokenised.of(plan.manifest), documents)
    assert small.contents(tmp_path) == before


@pytest.mark.usefixtures("small_pieces")
def test_what_was_not_used_may_be_another_corpus(tmp_path):
    plan = Plan(tmp_path)
    state = plan.tokenise(max_tokens=400)
    check_corpus(tmp_path, state, [*DOCUMENTS[: state.documents], "another", "end"])
    plan.tokenise([*DOCUMENTS[: state.documents], "another", "end"], max_tokens=None)
    assert bytes(plan.column("tokens")[-len("another") - 5 :].astype(np.uint8).tolist()).endswith(b"another\0end")


def test_a_corpus_that_was_used_up_may_not_be_longer(tmp_path):
    plan = Plan(tmp_path)
    state = plan.tokenise()
    check_corpus(tmp_path, state, DOCUMENTS)
    with pytest.raises(PlanMismatchError, match=rf"a corpus of {len(DOCUMENTS)} documents, and more are given now"):
        check_corpus(tmp_path, state, [*DOCUMENTS, "more"])


class Text(str):
    """A text whose life can be watched."""

    __slots__ = ("__weakref__",)


def test_documents_are_let_go(tmp_path):
    alive, most = weakref.WeakSet(), 0

    def documents():
        nonlocal most
        for number in range(8000):
            text = Text(f"document {number}")
            alive.add(text)
            most = max(most, len(alive))
            yield text

    Plan(tmp_path).tokenise(documents())
    # As many as are tokenised in one call, and those that come out of the call before.
    assert most < 2500


@pytest.mark.usefixtures("small_pieces")
def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "_TOKENS_A_COMMIT", 5000)

    def documents(number):
        for each in range(number):
            if each % 1000 == 0:
                gc.collect()  # what waits for the collector is not what grows
            yield f"text {each}"

    def peak(number):
        plan = Plan(tmp_path / f"{number}", pack=True)
        gc.freeze()
        tracemalloc.start()
        try:
            plan.tokenise(documents(number))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            gc.unfreeze()

    # The first reaches what is tokenised in one call and what is kept between two commits, several times over.
    assert peak(9000) < 1.3 * peak(3000)
