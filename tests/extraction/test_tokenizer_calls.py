"""A tokenizer that fails, panics, hangs or blows texts up: one error, with the document's number where there is one."""

import json
import time

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import Regex, models, normalizers, pre_tokenizers

import mmcache
import small_models
from mmcache.errors import CorpusError, CorruptError, UnsupportedModelError
from mmcache.extraction import corpus, tokenizer_calls
from mmcache.extraction.tokenization import Contexts
from mmcache.extraction.tokenizer_calls import ids_of_texts
from mmcache.models.tokenizer import growth, panics_as_errors
from mmcache.view.tokens import Detokenizer

# A panic says on stderr where it was.
_DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def fast(**parts):
    """A token a letter from a to c, and whatever is to go wrong before that."""
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for name, part in parts.items():
        setattr(inner, name, part)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def panicking():
    # The regular expression's engine gives up, which is a panic: as on a text that a tokenizer's own is slow for.
    return fast(pre_tokenizer=pre_tokenizers.Split(Regex("(b+)+$"), "isolated"))


class Calls:
    """Any function as a tokenizer."""

    def __init__(self, call):
        self.call = call

    def __call__(self, texts, **_options):
        return {"input_ids": self.call(texts) if isinstance(texts, str) else [self.call(text) for text in texts]}


def failing(text):
    if "x" in text:
        raise KeyError("x")
    return [0] * len(text)


def test_texts_are_tokenised_as_by_the_tokenizer():
    texts = ["abc", "", "a" * 1000]
    assert ids_of_texts(small_models.byte_tokenizer(), texts, 0) == [list(text.encode()) for text in texts]


def test_a_panic_names_the_document():
    texts = ["a", "b", "b" * 60 + "!", "c"]
    with pytest.raises(CorpusError, match="document 12 cannot be tokenised: RuntimeError: it panicked: Onig"):
        ids_of_texts(panicking(), texts, 10)


def test_any_other_error_names_the_document():
    with pytest.raises(CorpusError, match=r"document 3 cannot be tokenised: KeyError: 'x'") as caught:
        ids_of_texts(Calls(failing), ["a", "b", "c", "ax"], 0)
    assert isinstance(caught.value.__cause__, KeyError)


def test_texts_that_fail_only_together_are_named():
    class Together(Calls):
        def __call__(self, texts, **options):
            if len(texts) > 1:
                raise ValueError("several")
            return super().__call__(texts, **options)

    with pytest.raises(CorpusError, match="documents 5 to 6 cannot be tokenised together: ValueError: several"):
        ids_of_texts(Together(failing), ["a", "b"], 5)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_process_passes(error):
    def end(_text):
        raise error

    with pytest.raises(type(error)):
        ids_of_texts(Calls(end), ["a"], 0)


def test_what_takes_too_long_names_the_document(monkeypatch):
    monkeypatch.setattr(tokenizer_calls, "_SECONDS", 0.05)
    hangs = Calls(lambda text: time.sleep(1.0 if "x" in text else 0) or [0])
    with pytest.raises(CorpusError, match=r"document 7: the tokenizer was not done with 1 characters after 0 seconds"):
        ids_of_texts(hangs, ["x"], 7)
    with pytest.raises(CorpusError, match=r"documents 7 to 9: .* the longest, document 8, has 3 of them: cut it, or"):
        ids_of_texts(hangs, ["a", "xxx", "b"], 7)
    with pytest.raises(
        UnsupportedModelError, match=r"not done with the text 'a' after 0 seconds: give the model's own"
    ):
        Contexts(Calls(lambda _text: time.sleep(1.0)), 10)


def test_time_is_given_by_the_size_of_texts(monkeypatch):
    monkeypatch.setattr(tokenizer_calls, "_SECONDS", 0.0)
    monkeypatch.setattr(tokenizer_calls, "_SECONDS_A_MILLION", 1e6)
    slow = Calls(lambda _text: time.sleep(0.2) or [0])
    assert ids_of_texts(slow, ["aaaaaaaaaa"], 0) == [[0]]


def test_a_text_that_memory_does_not_suffice_for_is_refused(monkeypatch):
    monkeypatch.setattr(corpus, "available_memory", lambda: 320 << 20)
    called = Calls(len)
    assert ids_of_texts(called, ["a" * (1 << 20)], 0) == [1 << 20]
    for text in ("a" * (1 << 21), "ä" * (1 << 20)):
        with pytest.raises(CorpusError, match=r"document 1 is one text of 2\.1 MB, which takes about 0\.7 GB to token"):
            ids_of_texts(called, ["short", text], 0)


def test_a_tokenizer_that_fails_on_anything_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"fails on the text 'a': RuntimeError: it panicked: chunk size"):
        Contexts(fast(pre_tokenizer=pre_tokenizers.FixedLength(0)), 10)
    with pytest.raises(UnsupportedModelError, match="fails on the text 'a': KeyError"):
        Contexts(Calls(lambda text: {}[text]), 10)


def test_in_a_job_the_document_is_named_and_nothing_is_committed(tmp_path):
    texts = ["abc", "abcabc", "b" * 60 + "!"]
    with pytest.raises(CorpusError, match="document 2 cannot be tokenised"):
        mmcache.extract(small_models.llama(), panicking(), texts, tmp_path / "store", layers=[0], bos="none")
    store = mmcache.extract(small_models.llama(), panicking(), texts[:2], tmp_path / "other", layers=[0], bos="none")
    assert store.tokens.tolist() == [3, 3]


@pytest.mark.parametrize(("times", "refused"), [(8, False), (30, True)])
def test_a_normalizer_that_blows_texts_up_is_refused(times, refused):
    tokenizer = fast(normalizer=normalizers.Sequence([normalizers.Replace("a", "aa")] * times))
    if refused:
        with pytest.raises(UnsupportedModelError, match=r"may make a text 1,073,741,824 times as long"):
            Contexts(tokenizer, 10)
    else:
        assert len(next(Contexts(tokenizer, 1000).cut(["a"])).tokens) == 2**times


@pytest.mark.parametrize(
    ("part", "times"),
    [
        (None, 1),
        ({"type": "NFC"}, 1),
        (_DOUBLING, 2),
        ({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, 1),
        ({"type": "Replace", "pattern": {"String": "``"}, "content": '"'}, 1),
        ({"type": "Replace", "pattern": {"String": ""}, "content": "abc"}, 4),
        ({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, 2),
        ({"type": "Prepend", "prepend": "▁"}, 2),
        ({"type": "Sequence", "normalizers": [_DOUBLING] * 3}, 8),
        ({"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [_DOUBLING]}, _DOUBLING]}, 4),
        ({"type": "Sequence", "normalizers": None}, 1),
    ],
)
def test_how_much_longer_texts_get(part, times):
    assert growth(part) == times


def test_special_tokens_without_a_row_are_refused(tmp_path):
    tokenizer = small_models.letter_tokenizer(after=["[EOS]"])  # id 3
    Contexts(tokenizer, 10, 4)
    Contexts(tokenizer, 10)
    with pytest.raises(UnsupportedModelError, match=r"puts token ids up to 3 around texts, .* has 3 rows"):
        mmcache.extract(
            small_models.llama(vocab_size=3, pad_token_id=None), tokenizer, ["a"], tmp_path / "s", layers=[0]
        )
    # Between packed documents too, where nothing is put around them.
    plain = small_models.letter_tokenizer(eos_token="[EOS]")  # noqa: S106
    Contexts(plain, 10, 3)
    with pytest.raises(UnsupportedModelError, match="puts token ids up to 3"):
        Contexts(plain, 10, 3, pack=True)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint64, ">i4"])
@pytest.mark.parametrize("pack", [False, True])
def test_ids_of_a_file_are_taken_context_by_context(tmp_path, dtype, pack):
    np.save(tmp_path / "ids.npy", np.arange(25).astype(dtype))
    (document,) = mmcache.read_texts([tmp_path / "ids.npy"])
    found = [context.tokens for context in Contexts(small_models.letter_tokenizer(), 10, 60, pack=pack).cut([document])]
    assert [len(tokens) for tokens in found] == [10, 10, 5]
    assert {tokens.dtype for tokens in found} == {np.dtype(np.int32)}
    assert np.concatenate(found).tolist() == list(range(25))


def test_only_panics_become_errors():
    with pytest.raises(RuntimeError, match="it panicked: "), panics_as_errors():
        panicking().backend_tokenizer.encode("b" * 60 + "!")
    for error in (KeyboardInterrupt(), GeneratorExit(), ValueError()):
        with pytest.raises(type(error)), panics_as_errors():
            raise error


def kept(tmp_path, **parts):
    """A store that keeps a tokenizer with these parts."""
    store = mmcache.extract(small_models.llama(), fast(), ["abc"], tmp_path / "store", layers=[0], bos="none")
    text = json.dumps(json.loads(store.tokenizer_json()) | parts)
    store.tokenizer_json = lambda: text
    return store


def test_a_store_s_tokenizer_that_panics_is_named(tmp_path):
    precompiled = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(CorruptError, match=r"store: the tokenizer that it keeps cannot be read \(it panicked"):
        Detokenizer(kept(tmp_path, normalizer=precompiled))


def test_a_store_s_tokenizer_that_fails_on_a_token_is_named(tmp_path):
    decoder = {"type": "Replace", "pattern": {"Regex": "(a|a)*(a|a)*(a|a)*(a|a)*[^a]"}, "content": ""}
    words = Detokenizer(
        kept(tmp_path, decoder=decoder, model={"type": "WordLevel", "vocab": {"a" * 60: 0}, "unk_token": "?"})
    )
    with pytest.raises(CorruptError, match=r"store: the tokenizer that it keeps fails on token 0 \(it panicked: Onig"):
        words.texts([0])


def test_a_store_s_decoder_that_blows_texts_up_is_left_out(tmp_path):
    words = Detokenizer(kept(tmp_path, decoder={"type": "Sequence", "decoders": [_DOUBLING] * 40}))
    assert words.texts([0, 1]) == ["a", "b"]
