"""Models, tokenizers and texts that are small enough for tests, and what a folder holds."""

import contextlib
import functools
import json
import string

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

from mmcache.models.loading import DEMO, load_tokenizer

LAYERS, WIDTH, VOCABULARY = 3, 32, 257
PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def _randomised(model, seed):
    # Fresh norms are ones and fresh biases zeros, which would hide a site on the wrong side of one.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2, generator=generator)
    return model.eval()


def llama(seed=0, **options):
    config = transformers.LlamaConfig(**_SIZES | {"bos_token_id": 256, "eos_token_id": 255} | options)
    return _randomised(transformers.LlamaForCausalLM(config), seed)


def gpt2(seed=0, **options):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=256,
        eos_token_id=256, **options,
    )  # fmt: skip
    return _randomised(transformers.GPT2LMHeadModel(config), seed)


def bert(seed=0):
    config = transformers.BertConfig(**_SIZES)
    return _randomised(transformers.BertModel(config, add_pooling_layer=False), seed)


_LAYERS = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_IMAGES = _LAYERS | {"image_size": 32, "patch_size": 16}


def t5():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5Model(config).eval()


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**_IMAGES)).eval()


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).eval()


def llava(**options):
    """A model of text and images, whose configuration has the text's sizes in a part of its own."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_SIZES | options),
        vision_config=transformers.CLIPVisionConfig(**_IMAGES, projection_dim=WIDTH), image_token_index=5,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


@functools.cache
def byte_tokenizer():
    """The demo model's: a token a byte, and `<bos>` (256) before each text."""
    return load_tokenizer(str(DEMO))


def letter_tokenizer(before=(), after=(), **options):
    """A token a letter, with the special tokens of `before` and `after` around each text; ids below 60."""
    special = [PAD, "[CLS]", "[SEP]", END, UNKNOWN]
    vocabulary = {token: number for number, token in enumerate([*special, *string.ascii_letters])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if before or after:
        inner.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            special_tokens=[(token, vocabulary[token]) for token in (*before, *after)],
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, **options)


def contents(folder):
    """Every file below a folder and its bytes; what a lock file says of its last holder left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def identities(folder):
    """What tells whether a file was touched: inode, size and mtime of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        # A draft may be published, or removed, in between.
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found[str(path.relative_to(folder))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def said(folder):
    """What the root says, without what differs from run to run: the time, the command, and its own digest."""
    root = json.loads((folder / "zarr.json").read_text())["attributes"]["mmcache"]
    del root["digest"], root["source"]["record"]
    return root


def assert_same_store(one, two, *, but=()):
    """Two stores are equal file for file and byte for byte; their roots are, but for times and `but`."""
    ours, theirs = contents(one), contents(two)
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))
    differ = [name for name in ours if name != "zarr.json" and ours[name] != theirs[name]]
    assert not differ, differ
    roots = [said(folder) for folder in (one, two)]
    for root in roots:
        for name in but:
            root["source"].pop(name)
    assert roots[0] == roots[1], roots


def layers_path(family):
    """The outputs of the layers of a transformers model, as a site."""
    found = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
    return f"{(found | {'bert': 'encoder.layer'}).get(family, 'model.layers')}.*:out"
