"""Documents cut into contexts: frames, windows, packing, and cutting on from any place."""

import string
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmcache.errors import ArgumentError, CorpusError
from mmcache.extraction.tokenization import Contexts, CorpusDigest, CorpusPosition

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")

BOS, PAD, CLS, SEP, EOS = 256, 0, 1, 2, 3
TOKENIZERS = {
    "bos": small.byte_tokenizer,
    "framed": lambda: small.letter_tokenizer(["[CLS]"], ["[SEP]"]),
    "end": lambda: small.letter_tokenizer(eos_token=small.END),
    "bare": small.letter_tokenizer,
}
BUILT = {name: make() for name, make in TOKENIZERS.items()}
# What a tokenizer puts before and behind a text, and what separates packed documents.
FRAMES = {
    "bos": ([BOS], [], [BOS]),
    "framed": ([CLS], [SEP], [SEP]),
    "end": ([], [], [EOS]),
    "bare": ([], [], []),
}
texts = st.text(string.ascii_letters, max_size=12)
ids = st.lists(st.integers(0, 50), max_size=12).map(lambda numbers: np.array(numbers, np.int64))
documents = st.lists(st.one_of(texts, ids), max_size=8)


def cut(documents, length, tokenizer="bos", start=None, **options):
    return list(Contexts(BUILT[tokenizer], length, **options).cut(documents, start))


def tokens(contexts):
    return [context.tokens.tolist() for context in contexts]


def plain(document, tokenizer):
    if isinstance(document, str):
        return BUILT[tokenizer](document, add_special_tokens=False)["input_ids"]
    return document.tolist()


def test_a_document_is_cut_into_windows_each_with_the_frame():
    contexts = cut(["abcdefg", "xy"], 4, "framed")
    a = plain("a", "framed")[0]
    assert tokens(contexts) == [
        [CLS, a, a + 1, SEP],
        [CLS, a + 2, a + 3, SEP],
        [CLS, a + 4, a + 5, SEP],
        [CLS, a + 6, SEP],
        [CLS, a + 23, a + 24, SEP],
    ]
    assert [context.document for context in contexts] == [0, 0, 0, 0, 1]
    assert [context.after for context in contexts] == [
        CorpusPosition(0, 2),
        CorpusPosition(0, 4),
        CorpusPosition(0, 6),
        CorpusPosition(1),
        CorpusPosition(2),
    ]
    assert all(context.tokens.dtype == np.int32 for context in contexts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_frame_is_the_tokenizers_own(name):
    before, after, _ = FRAMES[name]
    assert tokens(cut(["hi"], 8, name)) == [[*before, *plain("hi", name), *after]]
    assert tokens(cut(["hi"], 8, name)) == [BUILT[name]("hi")["input_ids"]]


def test_ids_are_cut_as_they_are():
    assert tokens(cut([np.arange(5), "ab"], 4)) == [[0, 1, 2, 3], [4], [BOS, 97, 98]]


@pytest.mark.parametrize("pack", [False, True])
def test_documents_without_tokens_have_no_context(pack):
    nothing = np.array([], np.int32)
    assert cut(["", nothing, ""], 4, pack=pack) == []
    contexts = cut(["", "a", nothing, "", "b", ""], 8, "end", pack=pack)
    a = plain("a", "end")[0]
    assert tokens(contexts) == ([[a, EOS, a + 1, EOS]] if pack else [[a], [a + 1]])
    assert contexts[0].document == 1


def test_packed_documents_follow_each_other():
    contexts = cut(["abc", "de", "f"], 4, pack=True)
    a = 97
    assert tokens(contexts) == [[BOS, a, a + 1, a + 2], [BOS, a + 3, a + 4, BOS], [BOS, a + 5, BOS]]
    assert [context.document for context in contexts] == [0, 1, 2]
    assert [context.after for context in contexts] == [CorpusPosition(1), CorpusPosition(2), CorpusPosition(3)]
    # As plans made before have it: what separates documents comes behind the frame where a context begins with it.
    contexts = cut(["abc", "de", "f"], 4, pack=True, doubled=True)
    assert tokens(contexts) == [[BOS, a, a + 1, a + 2], [BOS, BOS, a + 3, a + 4], [BOS, BOS, a + 5, BOS]]
    assert [context.document for context in contexts] == [0, 0, 1]
    assert [context.after for context in contexts] == [CorpusPosition(0, 3), CorpusPosition(1, 2), CorpusPosition(3)]


def test_special_tokens_are_between_packed_documents_as_the_tokenizer_has_them():
    a = plain("a", "bare")[0]
    assert tokens(cut(["ab", "c"], 9, "framed", pack=True)) == [[CLS, a, a + 1, SEP, a + 2, SEP]]
    assert tokens(cut(["ab", "c"], 9, "end", pack=True)) == [[a, a + 1, EOS, a + 2, EOS]]
    assert tokens(cut(["ab", "c"], 9, "bare", pack=True)) == [[a, a + 1, a + 2]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_padding_side_and_truncation_do_not_matter(name):
    tokenizer = TOKENIZERS[name]() if name != "bos" else BUILT[name]
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token,
        padding_side="left", truncation_side="left", model_max_length=3,
    )  # fmt: skip
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=20)
    documents = ["abcdefgh", "xy", "", "q"]
    assert tokens(Contexts(tokenizer, 5).cut(documents)) == tokens(cut(documents, 5, name))


@given(documents, st.integers(3, 9), st.booleans(), st.sampled_from(sorted(TOKENIZERS)), st.booleans())
@example(documents=["aaaa", "", "", "bb", ""], length=3, pack=True, name="bare", doubled=False)
@example(documents=[np.array([1, 1, 7, 2, 1]), np.array([1]), "a"], length=3, pack=True, name="framed", doubled=False)
def test_cutting_on_from_any_place_gives_the_remaining_contexts(documents, length, pack, name, doubled):
    options = {"pack": pack, "doubled": doubled}
    contexts = cut(documents, length, name, **options)
    for number, context in enumerate(contexts):
        assert len(context.tokens) <= length
        rest = cut(documents[context.after.document :], length, name, start=context.after, **options)
        assert tokens(rest) == tokens(contexts[number + 1 :])
        assert [(c.document, c.after, c.framed) for c in rest] == [
            (c.document, c.after, c.framed) for c in contexts[number + 1 :]
        ]


@given(documents, st.integers(3, 9), st.sampled_from(sorted(TOKENIZERS)))
def test_apart_the_contexts_are_the_documents_and_their_frames(documents, length, name):
    before, after, _ = FRAMES[name]
    found = {}
    for context in cut(documents, length, name):
        ids = context.tokens.tolist()
        if isinstance(documents[context.document], str):
            assert (ids[: len(before)], ids[len(ids) - len(after) :]) == (before, after)
            ids = ids[len(before) : len(ids) - len(after)]
        found.setdefault(context.document, []).append(ids)
    expected = {number: plain(document, name) for number, document in enumerate(documents)}
    assert {n: [*chain(*parts)] for n, parts in found.items()} == {n: ids for n, ids in expected.items() if ids}
    # Only the last context of a document may be short.
    assert all(len(parts[0]) == len(part) for parts in found.values() for part in parts[:-1])


def bare(ids, before, after):
    """Ids without what they begin and end with of these."""
    ids = list(ids)
    while ids and ids[0] in before:
        ids.pop(0)
    while ids and ids[-1] in after:
        ids.pop()
    return ids


@given(documents, st.integers(3, 9), st.sampled_from(sorted(TOKENIZERS)), st.booleans())
@example(documents=[np.array([1, 1, 7, 2, 1]), np.array([1]), "a"], length=3, name="framed", doubled=False)
def test_packed_the_contexts_are_full_and_are_the_documents_one_after_the_other(documents, length, name, doubled):
    before, _, between = FRAMES[name]
    contexts = cut(documents, length, name, pack=True, doubled=doubled)
    assert all(len(context.tokens) == length for context in contexts[:-1])
    assert all(context.tokens.tolist()[: len(before)] == before for context in contexts)
    whole = []
    for document in documents:
        ids = plain(document, name)
        if ids and doubled:
            whole += [*ids, *between]
        elif bare(ids, before, between):
            whole += [*bare(ids, before if before == between else (), between), *between]
    expected = []
    while whole := whole if doubled else bare(whole, before, ()):
        expected.append(whole[: length - len(before)])
        whole = whole[length - len(before) :]
    assert [ids[len(before) :] for ids in tokens(contexts)] == expected


def test_many_texts_are_tokenised_together_and_in_order():
    # More than are tokenised in one call, some of them alone larger than that.
    texts = [f"{number}," for number in range(3000)] + ["x" * 600_000, "y" * 600_000, "z" * 1_200_000, "end"]
    contexts = cut(texts, 1 << 21)
    assert [bytes(context.tokens[1:].tolist()).decode() for context in contexts] == texts
    assert [context.document for context in contexts] == list(range(len(texts)))


def test_documents_are_read_only_as_far_as_contexts_are_asked_for():
    read = []

    def documents():
        for number in range(100_000):
            read.append(number)
            yield "some text " * 20

    contexts = Contexts(BUILT["bos"], 64).cut(documents())
    for _ in range(100):
        next(contexts)
    assert len(read) <= 1024


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("bad", [[-1], [3, 257], [2**31], [2**63 + 5]])
def test_ids_outside_the_vocabulary_are_refused(bad, pack):
    documents = ["fine", np.array([3, 256]), np.array(bad)]
    with pytest.raises(CorpusError, match=r"document 2 has token ids from .*: the model knows 0 to 256; was it"):
        cut(documents, 8, vocabulary=257, pack=pack)


def test_without_a_known_vocabulary_ids_need_only_fit():
    assert tokens(cut([np.array([2**31 - 1])], 8)) == [[2**31 - 1]]
    with pytest.raises(CorpusError, match="document 0 has token ids from 2147483648"):
        cut([np.array([2**31])], 8)


def test_a_tokenizer_of_another_model_is_noticed():
    with pytest.raises(CorpusError, match=r"document 1 has token ids from 31 to 31: the model knows 0 to 30"):
        cut(["a", "A"], 8, "bare", vocabulary=31)


@pytest.mark.parametrize("document", [["a", "b"], [1, 2], b"bytes", 3, None])
def test_what_is_neither_text_nor_ids_is_refused(document):
    with pytest.raises(CorpusError, match=r"document 1 is a .*: expected text or an array of token ids"):
        cut(["fine", document], 8)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.int64), np.zeros(2), np.array(3)])
def test_arrays_that_are_no_row_of_integers_are_refused(array):
    with pytest.raises(CorpusError, match=r"document 0 is .*: expected token ids \[n\]"):
        cut([array], 8)


def test_text_that_is_no_text_is_refused_by_number():
    # Half a surrogate pair comes out of JSON that was cut between the two: "\ud83d".
    with pytest.raises(CorpusError, match=r"document 1 has half of a surrogate pair at character 2"):
        cut(["fine", "ab\ud83d"], 8)


@pytest.mark.parametrize(("name", "special"), [("bos", 1), ("framed", 2)])
@pytest.mark.parametrize("pack", [False, True])
def test_a_context_has_room_for_a_token(name, special, pack):
    with pytest.raises(ArgumentError, match=rf"context_length is {special}: expected more than the {special} special"):
        cut(["a"], special, name, pack=pack)
    assert len(cut(["ab"], special + 1, name)) == 2


def test_a_tokenizer_that_changes_the_text_between_its_special_tokens_is_refused():
    def tokenizer(_text, *, add_special_tokens=True):
        return {"input_ids": [1, 7, 2] if add_special_tokens else [8]}

    with pytest.raises(CorpusError, match="does not hold its"):
        Contexts(tokenizer, 8)


def test_the_digest_tells_documents_apart():
    def digest(*documents):
        found = CorpusDigest()
        for document in documents:
            found.add(document)
        return found.hexdigest(), found.documents

    different = [
        digest(),
        digest("ab"),
        digest("a", "b"),
        digest("b", "a"),
        digest("ab", ""),
        digest("", "ab"),
        digest(np.array([97, 98])),
        digest(np.array([98, 97])),
        digest(np.array([97]), np.array([98])),
        digest("ä"),
        digest("a\u0308"),  # looks the same, and is tokenised otherwise
    ]
    assert len({hexdigest for hexdigest, _ in different}) == len(different)
    assert different[4][1] == 2
    # What integers they came as is no difference: the model sees the same ids.
    assert digest(np.array([97, 98], np.uint16)) == digest(np.array([97, 98], ">i8"))
    long = np.arange((1 << 20) + 3)
    assert digest(long) == digest(long.astype(np.int32)) != digest(long[:-1])


def test_a_copied_digest_goes_its_own_way():
    one = CorpusDigest()
    one.add("a")
    two = one.copy()
    before = one.hexdigest()
    two.add("b")
    assert (one.hexdigest(), one.documents, two.documents) == (before, 1, 2)
