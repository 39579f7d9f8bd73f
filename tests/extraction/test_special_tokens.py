"""The special tokens around a text: once, whoever writes them; a BOS as the tokenizer has it, in any case, or not."""

import warnings

import numpy as np
import pytest

from mmcache.errors import ArgumentError
from mmcache.extraction import tokenization as module
from mmcache.extraction.special_tokens import (
    BosWarning,
    frame_of,
    special_ids,
    unframed,
    warn_of_framed,
    warn_of_missing,
)
from mmcache.extraction.tokenization import Contexts

pytest.importorskip("transformers")
small = pytest.importorskip("small_models")

CLS, SEP, EOS = 1, 2, 3
A, B = 5, 6  # the letters
# What a tokenizer puts around a text, and the names that it has for it.
KINDS = {
    "bos": (["[CLS]"], [], {"bos_token": "[CLS]", "eos_token": "[SEP]"}),
    "bos and eos": (["[CLS]"], ["[SEP]"], {"bos_token": "[CLS]", "eos_token": "[SEP]"}),
    "bert": (["[CLS]"], ["[SEP]"], {"cls_token": "[CLS]", "sep_token": "[SEP]"}),
    "bos behind another": (["[SEP]", "[CLS]"], [], {"bos_token": "[CLS]", "sep_token": "[SEP]"}),
    "bos before another": (["[CLS]", "[SEP]"], ["[EOS]"], {"bos_token": "[CLS]", "sep_token": "[SEP]"}),
    "one for both": (["[EOS]"], ["[EOS]"], {"bos_token": "[EOS]"}),
    "eos": ([], ["[EOS]"], {}),
    "nothing": ([], [], {"bos_token": "[CLS]", "eos_token": "[SEP]"}),
}


def make(kind):
    before, after, names = KINDS[kind]
    return small.letter_tokenizer(before, after, **{"eos_token": "[EOS]"} | names)


BUILT = {kind: make(kind) for kind in KINDS}


def cut(texts, kind="bos", length=16, **options):
    return list(Contexts(BUILT[kind] if isinstance(kind, str) else kind, length, **options).cut(texts))


def ids(contexts):
    return [context.tokens.tolist() for context in contexts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_brings_special_tokens_itself_gets_them_once(kind):
    before, after, _ = KINDS[kind]
    plain = BUILT[kind]("ab")["input_ids"]
    begins = {"", "".join(before), "".join(before[:1]), "".join(before[-1:]), 2 * "".join(before)}
    ends = {"", "".join(after), 2 * "".join(after)}
    for begin in begins:
        for end in ends:
            (context,) = cut([f"{begin}ab{end}"], kind)
            assert context.tokens.tolist() == plain, (begin, end)
            assert context.framed == bool(begin or end)
    # What it brings elsewhere is its own.
    inside = "[CLS]" if kind != "one for both" else "[EOS]"
    assert ids(cut([f"a{inside}b"], kind)) == [BUILT[kind](f"a{inside}b")["input_ids"]]


TEMPLATES = {
    "begins and ends": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "begins": "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}",
    "begins each turn": "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "neither": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["bos", "bos and eos", "one for both", "nothing"])
@pytest.mark.parametrize("bos", ["auto", "add"])
def test_a_chat_template_has_one_bos_and_one_eos(kind, template, bos):
    tokenizer = make(kind)
    tokenizer.chat_template = TEMPLATES[template]
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    (context,) = cut([text], tokenizer, bos=bos)
    found, written = context.tokens.tolist(), tokenizer(text, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    has_bos = "bos" in kind or kind == "one for both" or bos == "add" or template.startswith("begins")
    assert (found[0] == first, found[1] == first) == (has_bos, False)
    assert (found[-1] == last, found[-2] == last) == (
        written[-1] == last or kind in ("bos and eos", "one for both"),
        False,
    )
    # All between them is the text's own.
    assert unframed(np.array(found), [first], [last]).tolist() == unframed(np.array(written), [first], [last]).tolist()


def test_every_window_has_the_frame_once():
    # The second one begins with a BOS of the text's own, and ends with its EOS.
    contexts = cut(["[CLS]aaa[CLS]b[SEP]bb[SEP]"], "bos and eos", 5)
    assert ids(contexts) == [[CLS, A, A, A, SEP], [CLS, B, SEP], [CLS, B, B, SEP]]
    assert [context.framed for context in contexts] == [1, 0, 0]
    # A text that fits with its own special tokens is not cut for those that are not put there.
    assert ids(cut(["[CLS]aaaa"], "bos", 5)) == [[CLS, A, A, A, A]]
    assert ids(cut(["[CLS]", "", "[CLS][SEP]"], "bos and eos", 5)) == []
    # A window of nothing but what the frame has is none.
    assert ids(cut(["a[CLS]a"], "bos", 2)) == [[CLS, A], [CLS, A]]


@pytest.mark.parametrize(
    ("kind", "expected", "framed"),
    [
        # Where the BOS separates documents, each of them has one before it.
        ("bos", [[CLS, A, A, CLS, B, B], [CLS, A, B, CLS, A, CLS]], 3),
        # Where an EOS does, a BOS that a document brings stays, but behind that of the frame.
        ("bos and eos", [[CLS, A, A, SEP, CLS, B], [CLS, B, SEP, A, B, SEP], [CLS, A, SEP]], 3),
        # Nothing is put before a text, so its BOS is a token as others are.
        ("nothing", [[CLS, A, A, SEP, CLS, B], [B, SEP, A, B, SEP, CLS], [SEP, CLS, A, SEP]], 2),
    ],
)
def test_packed_documents_are_separated_once(kind, expected, framed):
    texts = ["[CLS]aa[SEP]", "[CLS]bb[SEP]", "ab", "[CLS]", "[CLS]a"]
    if kind == "bos":
        texts = [text.replace("[SEP]", "") for text in texts]
    contexts = cut(texts, kind, 6, pack=True)
    assert ids(contexts) == expected
    assert sum(context.framed for context in contexts) == framed


def test_packed_ids_that_begin_with_a_bos_are_not_given_another():
    documents = [np.array([CLS, A, A]), np.array([CLS, B]), "[CLS]ab", np.array([B])]
    assert ids(cut(documents, "bos", 9, pack=True)) == [[CLS, A, A, CLS, B, CLS, A, B, CLS], [CLS, B, CLS]]
    # Each for itself, they are left as they are, and nothing is put around them.
    assert ids(cut(documents[:1], "bos", bos="add")) == [[CLS, A, A]]


def test_plans_of_before_go_on_as_they_began():
    contexts = cut(["[CLS]ab[SEP]"], "bos and eos", doubled=True)
    assert ids(contexts) == [[CLS, CLS, A, B, SEP, SEP]]
    assert contexts[0].framed == 0
    assert ids(cut(["[CLS]ab", "[CLS]b"], "bos", 5, pack=True, doubled=True)) == [
        [CLS, CLS, A, B, CLS],
        [CLS, CLS, B, CLS],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bos_in_any_case(kind):
    tokenizer = BUILT[kind]
    auto, add, none = (frame_of(tokenizer, bos, EOS, None) for bos in ("auto", "add", "none"))
    bos = tokenizer.bos_token_id or EOS  # the configuration's where the tokenizer has none
    own = auto.before.tolist()
    assert [*own, *auto.after] == BUILT[kind]("")["input_ids"]
    assert add.before.tolist() == (own if bos in own else [bos, *own])
    assert none.before.tolist() == [token for token in own if token != bos]
    assert auto.after.tolist() == add.after.tolist() == none.after.tolist()
    assert (add.missing, none.missing) == (None, None)
    assert auto.missing == (None if bos in own or EOS in own else EOS)
    # It is flagged, whoever has it.
    assert special_ids(tokenizer, "add", 9) == tuple(sorted({*tokenizer.all_special_ids, tokenizer.bos_token_id or 9}))
    assert special_ids(tokenizer, "auto", 9) == tuple(sorted(tokenizer.all_special_ids))


def test_a_text_has_its_own_bos_without_another():
    assert ids(cut(["ab", "[CLS]ab"], "bos", bos="none")) == [[A, B], [CLS, A, B]]
    assert ids(cut(["ab"], "bos before another", bos="none")) == [[SEP, A, B, EOS]]
    assert ids(cut(["ab", "[CLS]ab"], "nothing", bos="add")) == [[CLS, A, B], [CLS, A, B]]


@pytest.mark.parametrize(("model_bos", "said"), [(None, "neither has one"), (60, "the model has no row for id 60")])
def test_no_bos_to_add_is_refused(model_bos, said):
    with pytest.raises(ArgumentError, match=rf"bos is 'add', and the BOS is the .*: {said}. Give a tokenizer with a"):
        frame_of(BUILT["eos"], "add", model_bos, 60)
    assert frame_of(BUILT["eos"], "add", 59, 60).before.tolist() == [59]


@pytest.mark.parametrize(
    ("kind", "bos", "model_bos", "warns"),
    [
        ("nothing", "auto", CLS, True),
        ("eos", "auto", 9, True),
        ("nothing", "auto", None, False),
        # A row that the model does not have, as configurations' defaults may name.
        ("nothing", "auto", 50256, False),
        ("nothing", "add", CLS, False),
        ("nothing", "none", CLS, False),
        ("bos", "auto", CLS, False),
        ("bos", "auto", 9, False),
        ("bert", "auto", CLS, False),
    ],
)
def test_a_bos_that_is_not_added_is_warned_of(kind, bos, model_bos, warns):
    frame = frame_of(BUILT[kind], bos, model_bos, 60)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_missing(frame)
        warn_of_framed(0, 9)
    assert [warning.category for warning in caught] == [BosWarning] * warns
    assert all(f"has a BOS (id {model_bos}), and its tokenizer puts none" in str(one.message) for one in caught)


def test_a_frame_takes_room():
    with pytest.raises(
        ArgumentError, match="context_length is 1: expected more than the 1 special tokens that are put"
    ):
        Contexts(BUILT["nothing"], 1, bos="add")
    assert ids(cut(["ab"], "nothing", 1)) == [[A], [B]]


@pytest.mark.parametrize("pack", [False, True])
def test_documents_are_counted_once_wherever_it_goes_on(pack, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER_TEXTS", 3)
    texts = ["[CLS]" * (number % 3 == 0) + "ab" * (number % 7) + "[SEP]" * (number % 4 == 0) for number in range(60)]
    contexts = cut(texts, "bos and eos", 7, pack=pack)
    wanted = sum((number % 3 == 0 or number % 4 == 0) and number % 7 > 0 for number in range(60))
    assert sum(context.framed for context in contexts) == wanted
    for at, context in enumerate(contexts[:-1], 1):
        rest = Contexts(BUILT["bos and eos"], 7, pack=pack).cut(texts[context.after.document :], context.after)
        assert sum(one.framed for one in rest) == sum(one.framed for one in contexts[at:])
