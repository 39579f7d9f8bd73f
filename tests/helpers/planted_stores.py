"""Stores in which all that views should point out is planted, their rows as plain numbers, and terminals to draw on."""

import io
import re

import numpy as np
import torch
from rich.console import Console

import mmcache

SITE, LAYERS, WIDTH, LENGTHS = "resid_post", 3, 16, (300, 1, 500, 99)
TOTAL = sum(LENGTHS)
STARTS = np.cumsum([0, *LENGTHS[:-1]])
BOS = 1
# Layer 0 has a NaN and an infinity, layer 1 an outlier dimension and a row of zeros, layer 2 a dead dimension.
NAN, INFINITE, ZERO, OUTLIER, DEAD, DEAD_VALUE = 700, 710, 40, 5, 9, 0.5


def rows():
    """What is written: `[layers, tokens, width]`; first tokens have norms fifty times the others'."""
    made = np.random.default_rng(0).normal(0, 1, (LAYERS, TOTAL, WIDTH))
    made[:, STARTS] *= 50
    made[1, :, OUTLIER] += 40
    made[2, :, DEAD] = DEAD_VALUE
    made[0, NAN, 3] = np.nan
    made[0, INFINITE, 4] = -np.inf
    made[1, ZERO] = 0
    return torch.from_numpy(made)


def stored(dtype=torch.float32):
    """What is stored, as float64."""
    return rows().to(dtype).double().numpy()


def counted():
    """Which rows count in statistics: `[layers, tokens]`."""
    keep = np.isfinite(stored()).all(axis=-1)
    keep[:, STARTS] = False
    return keep


def tokens():
    """Ids; the first of each sequence is BOS."""
    ids = 2 + np.arange(TOTAL) % 47
    ids[STARTS] = BOS
    return ids


def planted(path, layout="token", dtype=torch.float32, site=SITE):
    """Make the store: two shards a file's worth of layers, the second partly filled."""
    given, ids = rows().to(dtype), torch.from_numpy(tokens())
    with mmcache.create(
        path, sites={site: WIDTH}, n_layers=LAYERS, layout=layout, dtype=dtype, shard_tokens=512, special_tokens=[BOS]
    ) as writer:
        for start, length in zip(STARTS, LENGTHS, strict=True):
            writer.append(ids[start : start + length], {site: given[:, start : start + length]})
    return mmcache.open(path)


def terminal(width, *, colours=False, **options):
    """A terminal of so many columns; without colours it is a pipe. Nothing of the environment counts."""
    given = {"force_terminal": True, "color_system": "truecolor"} if colours else {}
    return Console(file=io.StringIO(), width=width, _environ={}, **given | options)


def drawn(console):
    """What was drawn on a terminal."""
    return console.file.getvalue()


def unstyled(text):
    """A text without the sequences that colour it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def numbers(text):
    """The words of a text that have a digit in them, without what is around them."""
    return {word.strip("[](),:;") for word in text.split() if any(letter.isdigit() for letter in word)}
