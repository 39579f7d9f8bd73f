"""Arguments that nobody should give: each public function takes them, or refuses them with an error of ours."""

import contextlib
import inspect
import itertools
import os
import shutil
import signal
import socket
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import damaged_stores
import mmcache
import small_models
from mmcache import cli, view
from mmcache.models import sites
from mmcache.system.arguments import a_path, count, names, shown

# What is given in place of every argument. Of what can be used up there is a new one each time.
ODD = {
    "none": lambda: None, "true": lambda: True, "text": lambda: "x", "digit": lambda: "8", "below": lambda: -1,
    "zero": lambda: 0, "half": lambda: 1.5, "nan": lambda: float("nan"), "infinite": lambda: float("inf"),
    "2**31": lambda: 2**31, "2**48": lambda: 2**48, "2**60": lambda: 2**60, "2**70": lambda: 2**70,
    "10,000 digits": lambda: 10**10_000, "float in a list": lambda: [1.7], "text in a list": lambda: ["12"],
    "2**70 in a list": lambda: [2**70], "empty list": list, "empty dict": dict, "dict": lambda: {"a": 1},
    "object": object, "bytes": lambda: b"x", "numpy int": lambda: np.int64(3), "numpy float": lambda: np.float32(2),
    "array": lambda: np.arange(3), "tensor": lambda: torch.tensor(3), "floats": lambda: torch.tensor([1.5]),
    "uneven lists": lambda: [[1, 2], [3]], "cuda": lambda: "cuda:7", "function": lambda: print,
    "generator": lambda: (letter for letter in "ab"), "without end": itertools.count, "dtype": lambda: torch.int8,
    "device": lambda: torch.device("meta"), "set": lambda: {1}, "NUL": lambda: "a\0b", "long": lambda: "x" * 5000,
    "surrogate": lambda: "\ud800",
}  # fmt: skip


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Stores of each kind, and what the functions take beside the argument that is odd."""
    base = tmp_path_factory.mktemp("arguments")
    damaged_stores.grown(base / "grown").close()
    damaged_stores.extracted(base / "planned").close()
    damaged_stores.cache(base / "cache").close()
    mmcache.push(base / "grown", f"file://{base}/bucket")
    (base / "text.txt").write_text("hello")
    return base


def functions(base):
    """Each public function with arguments that it takes; `new` is a path that is free."""
    new, grown = base / "new", mmcache.open(base / "grown")
    planned, cache = mmcache.open(base / "planned"), mmcache.FullActivationCache.open(base / "cache")
    site, model = grown["a"], small_models.llama()

    def closed(function, **usual):
        return (lambda **given: function(**{**usual, **given}).close()), usual

    def called(function, **usual):
        return (lambda **given: function(**{**usual, **given})), usual

    def append(**given):
        with mmcache.create(new, sites={"q": 4}, n_layers=2) as writer:
            writer.append(**given)

    found = {
        "create": closed(mmcache.create, path=new, sites={"q": 4}, n_layers=2, dtype="float32", layout="token",
                         shard_tokens=8, special_tokens=[1], tokenizer=None, metadata={}),
        "with_capacity": closed(mmcache.FullActivationCache.with_capacity, n_layers=1, path=new, dtype="float32",
                                site="q", shard_tokens=8),
        "open": closed(mmcache.open, path=base / "grown", partial=False, check=True),
        "extract": called(mmcache.extract, model=model, tokenizer=small_models.byte_tokenizer(), texts=["abc def"] * 2,
                          path=new, sites=("mlp_in",), layers=[0], context_length=24, pack=False, bos="auto",
                          batch_size=2, dtype="float32", layout="token", shard_tokens=8, max_tokens=None, device="cpu",
                          accept_numerics=False, strict=False, record={}, staging=None, staging_bytes=None,
                          progress=None),
        "verify": called(mmcache.verify, path=base / "grown", level="quick", progress=None),
        "repair": called(mmcache.repair, path=base / "grown", level="quick", progress=None),
        "export": called(mmcache.export, store=grown, out=new, to="npy", sites=None, layers=None, dtype=None,
                         progress=None),
        "push": called(mmcache.push, path=base / "grown", url=f"file://{new}", sites=None, sequences=None),
        "pull": called(mmcache.pull, url=f"file://{base}/bucket", path=new, sites=None, sequences=None),
        "read_texts": called(lambda **given: list(mmcache.read_texts(**given)), sources=[base / "text.txt"],
                             field="text"),
        "append": called(append, tokens=[1, 2], activations={"q": torch.zeros(2, 2, 4)}, attention_mask=None,
                         flags=None, continues=False),
        "get_position": called(site.get_position, layer=0, position=1, device="cpu"),
        "get_layer": called(site.get_layer, layer=0, device="cpu"),
        "get_positions": called(site.get_positions, layer=0, positions=[1, 2], device="cpu"),
        "gather": called(site.gather, positions=[1, 2], layers=None, device="cpu", out=None),
        "sequence": called(site.sequence, index=0, device="cpu"),
        "locate": called(grown.locate, position=1),
        "read_tokens": called(grown.read_tokens, start=0, stop=3),
        "cache.get_position": called(cache.get_position, layer=0, position=1),
        "cache.get_positions": called(cache.get_positions, layer=0, positions=[1]),
        "Split": called(mmcache.Split, part="train", fraction=0.1, by="sequence", seed=0),
        "dataset": called(lambda **given: next(iter(mmcache.ActivationDataset(**given))), store=grown, sites=None,
                          layers=None, batch_size=8, seed=0, drop=None, normalize=None, split=None, device="cpu",
                          dtype=None, rank=None, world_size=None, nodes=None),
        "sites.resolve": called(sites.resolve, model=model, sites=("mlp_in",), layers=None),
        "load_direction": called(view.load_direction, file=base / "text.txt"),
        "Detokenizer": called(view.Detokenizer, store=planned),
    }  # fmt: skip
    usual = {"store": planned, "site": "mlp_in", "layer": 0, "number": 0, "position": 3, "dimension": 1, "text": "text",
             "direction": 1}  # fmt: skip
    for name in ("sequence", "token", "dimensions", "dimension", "find", "health", "norms", "apart", "layer_view",
                 "row_view", "statistics_view", "top"):  # fmt: skip
        wanted = inspect.signature(getattr(view, name)).parameters
        given = {key: one.default if one.default is not one.empty else usual[key] for key, one in wanted.items()}
        found[f"view.{name}"] = called(getattr(view, name), **{**given, **{k: usual[k] for k in usual if k in wanted}})
    return found


@contextlib.contextmanager
def in_time(seconds):
    def late(*_):
        raise AssertionError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_whatever_an_argument_is_it_is_taken_or_refused_with_an_error_of_ours(there, tmp_path, monkeypatch):
    """And what would be made is not there, or can be opened."""
    monkeypatch.chdir(tmp_path)
    new, wrong = there / "new", []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, (function, usual) in functions(there).items():
        for argument, odd in itertools.product(usual, ODD):
            # A hub is asked for what is no path, which takes its time where there is none.
            if (name, argument) == ("read_texts", "sources") and odd in {"text in a list", "dict", "generator"}:
                continue
            try:
                with in_time(20), warnings.catch_warnings(action="ignore"):
                    function(**{**usual, argument: ODD[odd]()})
            except mmcache.MmcacheError:
                if name in {"create", "with_capacity"} and new.exists():
                    wrong.append(f"{name}({argument}={odd}) left {list(new.iterdir())}")
            except BaseException as error:  # noqa: BLE001 -- which is what is looked for
                wrong.append(f"{name}({argument}={odd}): {error!r}"[:200])
            shutil.rmtree(new, ignore_errors=True)
    torch.set_num_threads(before)
    assert not wrong, "\n".join(wrong)
    assert not {one.name for one in tmp_path.iterdir()} - {"x", "8", "cuda:7"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 2**31}, "n_layers is 2147483648: expected a whole number from 1 to 65536"),
        ({"n_layers": 1.0}, r"n_layers is 1\.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"sites": {"a": 2**48}}, "d_model of 'a' is 281474976710656"),
        ({"sites": {"a": "12"}}, "d_model of 'a' is '12'"),
        ({"sites": {"a": 2**28}, "n_layers": 64}, "a row of 'a' takes"),
        ({"special_tokens": [2**70]}, r"special_tokens\[0\] is 1180591620717411303424"),
        ({"special_tokens": [1.7]}, r"special_tokens\[0\] is 1\.7"),
        ({"special_tokens": "12"}, "special_tokens is '12': expected a list of whole numbers"),
        ({"path": ""}, "path is '': expected a path"),
        ({"path": "s3://bucket/store"}, r"an address: expected a folder \(mmcache.push"),
        ({"path": "a\0b"}, "without a NUL"),
        ({"path": "x" * 300}, "300 bytes: expected a path of at most 4095, each part of at most 255"),
        ({"shard_tokens": 2**60}, "shard_tokens is 1152921504606846976"),
        ({"shard_tokens": 8.0}, r"shard_tokens is 8\.0"),
        ({"layout": 1}, "layout is 1: expected 'layer' or 'token'"),
        ({"metadata": {1: 2}}, "metadata changes when kept as JSON"),
    ],
)
def test_create_refuses_before_anything_is_there(tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    given = {"path": "acts", "sites": {"a": 4}, "n_layers": 1, **changes}
    with pytest.raises(mmcache.ArgumentError, match=said):
        mmcache.create(**given)
    assert not list(tmp_path.iterdir())


def test_what_can_be_counted_is_a_whole_number():
    for one in (3, np.int64(3), torch.tensor(3), np.uint8(3)):
        found = count(1)("n", one)
        assert (found, type(found)) == (3, int)


def test_one_name_alone_is_no_list_of_names():
    with pytest.raises(mmcache.ArgumentError, match=r"sites is the string 'a': expected a list of names, \['a'\]"):
        names("sites", "a")


def test_a_value_that_is_long_is_cut_in_an_error():
    assert len(shown("x" * 1000)) == 98
    assert shown(10**10_000) == "a int too long to be written"
    assert a_path("path", "a/" * 2000) == "a/" * 2000


@pytest.fixture
def places(tmp_path):
    """Paths at which there is something else than a folder."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(tmp_path / "socket"))
        yield tmp_path


@pytest.mark.parametrize("name", ["file", "loop", "nowhere", "pipe", "socket", "file/below", "loop/below", "x" * 300])
@pytest.mark.parametrize(
    "function",
    [
        mmcache.open,
        mmcache.append,
        mmcache.verify,
        mmcache.repair,
        mmcache.FullActivationCache.open,
        view.overview,
        lambda path: mmcache.create(path / "acts", sites={"a": 4}, n_layers=1),
        lambda path: mmcache.FullActivationCache.with_capacity(1, path / "acts"),
        lambda path: mmcache.push(path, "file:///nowhere"),
        lambda path: mmcache.pull(f"file://{path}", path / "acts"),
        lambda path: mmcache.export(path, path / "out", to="npy"),
        lambda path: list(mmcache.read_texts([path / "text.txt"])),
    ],
)
def test_a_path_that_is_no_folder_is_an_error_of_ours(places, name, function):
    with in_time(20), pytest.raises(mmcache.MmcacheError) as caught:
        function(places / name)
    assert str(caught.value)


MORE = {"export": ["--out", "out", "--to", "npy"], "show": ["0"]}


@pytest.mark.parametrize("command", ["info", "verify", "repair", "show", "export"])
@pytest.mark.parametrize("path", ["x" * 300, "file", "loop"])
def test_a_command_says_it_in_one_line(places, command, path):
    result = CliRunner().invoke(cli.main, [command, str(places / path), *MORE.get(command, ())])
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1, result.output


def test_a_command_says_in_one_line_that_it_cannot_write(places):
    damaged_stores.grown(places / "acts").close()
    result = CliRunner().invoke(
        cli.main, ["export", str(places / "acts"), "--out", str(places / "file"), "--to", "npy"]
    )
    assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1), result.output


def test_a_read_that_the_system_refuses_is_an_error_of_ours(tmp_path, monkeypatch):
    store = damaged_stores.grown(tmp_path / "acts")

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(mmcache.ReadError, match="cannot be read") as caught:
        store["a"].gather([0, 1])
    assert (caught.value.errno, isinstance(caught.value, OSError)) == (5, True)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (lambda: torch.empty(3, 2, 8), "out is"),
        (lambda: torch.empty(2, 8), "out is"),
        (lambda: "x", "out is"),
        (lambda: torch.empty(1, 2, 8).expand(2, 2, 8), "share memory"),
        (lambda: torch.empty(2, 2, 8, requires_grad=True), "requires grad"),
        (
            lambda: torch.from_numpy(np.memmap(__file__, mode="r", shape=(2, 2, 8), dtype="float32")),
            "cannot be written",
        ),
    ],
)
def test_rows_are_put_only_where_they_can_be(tmp_path, out, said):
    with mmcache.create(tmp_path / "acts", sites={"a": 8}, n_layers=2, dtype="float32") as writer:
        writer.append([1, 2, 3], {"a": torch.ones(2, 3, 8)})
    with mmcache.open(tmp_path / "acts") as store, warnings.catch_warnings(action="ignore"):
        with pytest.raises(mmcache.MmcacheError, match=said):
            store["a"].gather([0, 1], out=out())
        free = torch.empty(2, 2, 8)
        store["a"].gather([0, 1], out=free)
        assert free.eq(1).all()
