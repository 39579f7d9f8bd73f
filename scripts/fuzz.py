"""Fuzz the parsers of untrusted files, guided by coverage: they may raise only mmcache's own errors.

Usage: .venv/bin/python -m pip install atheris, then .venv/bin/python scripts/fuzz.py {header,root,tokenizer} [-runs=N]
Options with one dash are libFuzzer's. It keeps the inputs that failed in `crash-*` files.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mmcache"]):
    import mmcache
    from mmcache.format.dtypes import BY_NAME
    from mmcache.format.manifest import Manifest, read_manifest
    from mmcache.format.shard import Layout, ShardSpec, parse_header
    from mmcache.read.describe import overview
    from mmcache.view.tokens import Detokenizer

__all__ = ["TARGETS", "seeds"]

_FOLDER = Path(tempfile.mkdtemp(prefix="mmcache-fuzz-"))
_SPEC = ShardSpec("activations", BY_NAME["bfloat16"], (2, 8), 512, 128, stat_layers=2)
_SAID = {"format": "mmcache/1", "store": "s", "array": "a", "key": "c.0.0.0", "layout": "token", "layers": "0,1",
         "first_token": "0"}  # fmt: skip


def _header(data: bytes) -> None:
    size = int.from_bytes(data[:3], "little")
    parse_header(_SPEC, data[3:4099], size, _SAID, where="fuzzed")


def _root(data: bytes) -> None:
    # With a correct digest, which an attacker can compute too: otherwise every input would fail there.
    blank = b"0" * 64
    if data.count(blank) == 1:
        data = data.replace(blank, hashlib.sha256(data).hexdigest().encode())
    (_FOLDER / "zarr.json").write_bytes(data)
    read_manifest(_FOLDER)
    overview(_FOLDER)


class _Kept(mmcache.Store):
    """A store that is a tokenizer alone."""

    where = str(_FOLDER)

    def __init__(self, text: str) -> None:
        self._text = text

    def tokenizer_json(self) -> str:
        return self._text


def _tokenizer(data: bytes) -> None:
    words = Detokenizer(_Kept(data.decode(errors="replace")))
    words.texts(range(20))


TARGETS = {"header": _header, "root": _root, "tokenizer": _tokenizer}


def seeds(target: str) -> list[bytes]:
    """Valid inputs to start from."""
    if target == "header":
        layout = Layout(_SPEC, 400)
        ids = {**_SAID, "ids": "0" * 32}
        return [layout.size.to_bytes(3, "little") + layout.header(said) for said in (_SAID, ids)]
    if target == "root":
        plain = Manifest("grown", "s", "token", "bfloat16", {"a": 8}, (0, 1)).with_geometry(512, None).to_json()
        at = plain.index(b'"digest": "') + 11
        return [plain[:at] + b"0" * 64 + plain[at + 64 :]]
    model = b'{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}'
    return [b'{"version":"1.0","added_tokens":[],"decoder":{"type":"ByteLevel"},"model":%b}' % model]


def main() -> None:
    """Fuzz one target."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    target = sys.argv.pop(1)
    corpus = _FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(target)):
        (corpus / f"{number}").write_bytes(seed)

    def once(data: bytes) -> None:
        try:
            TARGETS[target](data)
        except mmcache.MmcacheError:
            return

    atheris.Setup([*sys.argv, "-max_len=6000", str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
