"""Tokens as text, by tokenizers of every kind: the pieces of a text make the text."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import mmcache
from damaged_stores import extracted, grown
from mmcache.storage.tokenizer_file import TOKENIZER
from mmcache.view.tokens import Detokenizer, surroundings
from stores_and_processes import damage, flip

TEXT = "The quick brown fox — naïve, 東京 and 🦊🦊 — jumps\n\tover  two  spaces.\n"


class KeptTokens(mmcache.Store):
    """A store, as far as words go."""

    where = "acts"

    def __init__(self, tokenizer):
        self.text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()

    def tokenizer_json(self):
        return self.text


def byte_level():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([TEXT, "the fox jumps over the fox"], trainer)
    made.add_special_tokens(["<bos>"])
    return made


def sentencepiece():
    letters = sorted({*TEXT.replace(" ", "▁"), "▁"} - set("🦊東京"))
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        letter: 256 + at for at, letter in enumerate(letters)
    }
    vocabulary |= {"▁f": len(vocabulary), "<unk>": len(vocabulary) + 1}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "f")], byte_fallback=True, unk_token="<unk>"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_pieces_of_a_text_make_the_text(make):
    tokenizer = make()
    words = Detokenizer(KeptTokens(tokenizer))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert len(ids) > 20
    whole = b"".join(words.bytes_of(token) for token in ids).decode()
    assert whole.removeprefix(" ") == TEXT
    table, starts = words.table
    again = b"".join(table[starts[token] : starts[token + 1]].tobytes() for token in ids)
    assert again.decode().removeprefix(" ") == TEXT


def test_a_part_of_a_letter_is_shown_as_such():
    tokenizer = byte_level()
    words = Detokenizer(KeptTokens(tokenizer))
    ids = tokenizer.encode("🦊").ids
    if len(ids) == 1:
        ids = [tokenizer.token_to_id(letter) for letter in "ðŁ"]
    assert "�" in "".join(words.texts(ids[:1]))


def test_special_and_unknown_tokens():
    tokenizer = byte_level()
    words = Detokenizer(KeptTokens(tokenizer))
    assert words.texts([tokenizer.token_to_id("<bos>"), -1, 10**6]) == ["<bos>", "⟨-1⟩", "⟨1000000⟩"]
    assert words.known
    assert words.size == tokenizer.get_vocab_size()


def test_a_store_without_a_tokenizer_shows_ids(tmp_path):
    store = grown(tmp_path / "acts")
    words = Detokenizer(store)
    assert not words.known
    assert words.texts([3, 4]) == ["⟨3⟩", "⟨4⟩"]


def test_a_damaged_tokenizer_is_an_error(tmp_path):
    store = extracted(tmp_path / "acts")
    damage(store.path / TOKENIZER, flip(100))
    with pytest.raises(mmcache.CorruptError):
        Detokenizer(store)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", '{"version":"1.0"}', "[" * 100_000, byte_level().to_str().replace('"BPE"', '"XYZ"')],
)
def test_a_tokenizer_that_is_none_is_an_error_of_ours(text):
    with pytest.raises(mmcache.CorruptError, match="cannot be read"):
        Detokenizer(KeptTokens(text))


def test_a_token_that_was_made_to_take_memory_is_cut():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"x" * 10**6: 0, "y": 1}, unk_token="y"))  # noqa: S106
    words = Detokenizer(KeptTokens(tokenizer))
    assert len(words.bytes_of(0)) == 1024
    assert len(words.table[0]) < 2000


def test_what_is_around_a_token_ends_where_its_sequence_does(tmp_path):
    store = extracted(tmp_path / "acts", ["one", "two words"])
    words, second = Detokenizer(store), store.sequences[1]
    said = surroundings(store, second.start + 1, 5, words)
    assert said["text"] == "t"
    assert said["after"] == "wo wo"
    assert "e" not in said["before"], "that is the end of the first"
    assert surroundings(store, second.start + 1, 2, words, width=3)["text"] == "two"


def test_texts_are_those_of_the_transformers_tokenizer(tmp_path):
    store = extracted(tmp_path / "acts")
    kept = tokenizers.Tokenizer.from_str(store.tokenizer_json())
    words = Detokenizer(store)
    ids = np.asarray(store.tokens)[1:20].tolist()
    assert "".join(words.texts(ids)) == kept.decode(ids, skip_special_tokens=False)
    assert json.loads(store.tokenizer_json())["model"]
