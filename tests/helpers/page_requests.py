"""Pages for tests: served from a thread, of the demo model's store and of stores that strangers made."""

import contextlib
import http.client
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

import mmcache
import small_models
from mmcache.models.loading import load_model, load_tokenizer
from mmcache.view.server import Page

SCRIPT = "<script>window.__hacked=1</script>"
IMAGE = "<img src=x onerror=window.__hacked=1>"
TEX = r"$\href{javascript:window.__hacked=1}{x}$"
LINK = '<a href="javascript:window.__hacked=1">x</a>'
WORDS = [SCRIPT, "<img/src=x/onerror=window.__hacked=1>", TEX, "<b>&lt;b&gt;", "'\"><svg/onload=window.__hacked=1>"]


def demo_store(path, **options):
    """The demo model's activations of a few modules of Python's own."""
    texts = [Path(module.__file__).read_text() for module in (contextlib, http.client)]
    given = {"sites": ("mlp_in", "resid_post"), "shard_tokens": 4096, "max_tokens": 24_000} | options
    return mmcache.extract(load_model("demo", None), load_tokenizer("demo"), texts, path, **given)


def hostile_tokens(path):
    """A store whose tokens' texts are markup, scripts and TeX."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 -- no password
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")  # noqa: S106
    return mmcache.extract(
        small_models.llama(bos_token_id=None), tokenizer, [" ".join(WORDS * 12)] * 3, path, sites=("mlp_in",),
        context_length=24, batch_size=3, shard_tokens=64,
    )  # fmt: skip


def hostile_names(path):
    """A store whose sites and metadata are markup and scripts."""
    metadata = {"note": SCRIPT, IMAGE: {SCRIPT: LINK, "deep": [IMAGE, TEX]}}
    sites = {IMAGE: 8, "<b>site&amp;": 4}
    with mmcache.create(
        path, sites=sites, n_layers=2, dtype=torch.float32, shard_tokens=256, metadata=metadata
    ) as writer:
        rows = {site: torch.randn(2, 600, width) for site, width in sites.items()}
        writer.append(torch.randint(0, 9, (600,)), rows)
    return mmcache.open(path)


@contextlib.contextmanager
def serving(source):
    """Serve a page from a thread."""
    page = Page(source)
    # Traceback of what tests make fail belong in nobody's terminal.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    thread = threading.Thread(target=page.run)
    thread.start()
    try:
        yield page
    finally:
        page.stop()
        thread.join(20)
        source.store.close()
        assert not thread.is_alive()


def bearer(token):
    """The header that a token, or the secret, is sent in."""
    return {"Authorization": f"Bearer {token}"}


def ask(page, where, *, method="GET", secret=True, **headers):
    """Ask the page for something, as raw as can be: `Host=` and others as they are given, none followed."""
    if secret:
        headers = bearer(page.access.secret) | headers
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    try:
        connection.putrequest(method, where, skip_host=True, skip_accept_encoding=True)
        for name, value in ({"Host": f"127.0.0.1:{page.port}"} | headers).items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read())
    finally:
        connection.close()
