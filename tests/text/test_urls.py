"""No password, signature or key in an address, in an endpoint or in what a client says is ever shown."""

import io
import pickle
import traceback

import pytest
from click.testing import CliRunner

import fake_s3
import mmcache
import remote_stores
from mmcache import errors
from mmcache.cli import main
from mmcache.storage import object_store
from mmcache.storage.object_store import ObjectStore
from mmcache.urls import address, concealed, is_url, redacted
from mmcache.view.panels import Source
from page_requests import ask, serving
from stores_and_processes import without_sync

SECRET = "pa55w0rd"  # noqa: S105 -- planted
ADDRESSES = {
    "s3://bucket/acts": "s3://bucket/acts",
    f"s3://key:{SECRET}@bucket/acts": "s3://bucket/acts",
    f"s3://key:se/{SECRET}+/x@bucket/acts": "s3://bucket/acts",
    f"s3://{SECRET}@bucket/acts": "s3://bucket/acts",
    f"s3://bucket/acts?X-Amz-Signature={SECRET}&a=b": "s3://bucket/acts",
    f"s3://bucket/acts#{SECRET}": "s3://bucket/acts",
    "s3://bucket/me@home/a:b": "s3://bucket/me@home/a:b",
    f"gs://key:{SECRET}@at@bucket/acts": "gs://bucket/acts",
    "abfss://container@account.dfs.core.windows.net/acts": "abfss://container@account.dfs.core.windows.net/acts",
    f"abfss://container:{SECRET}@account.dfs.core.windows.net/acts?sig={SECRET}": (
        "abfss://container@account.dfs.core.windows.net/acts"
    ),
    "file:///acts/me@home": "file:///acts/me@home",
}  # fmt: skip


@pytest.mark.parametrize("given", ADDRESSES)
def test_an_address_is_known_by_what_says_where_a_store_is(given):
    assert is_url(given)
    assert address(given) == ADDRESSES[given] == address(address(given))
    if "#" not in given:
        assert SECRET not in redacted(f"{given!r} and {given}/zarr.json, ({given})")


TEXTS = {
    f"GET http://me:{SECRET}@host:90/b/x?X-Amz-Signature=ab in 3 ms": "GET http://***@host:90/b/x in 3 ms",
    f"no such folder: 'https:/me:{SECRET}@host/x'": "no such folder: 'https:/***@host/x'",
    f"(s3://b/x?a={SECRET}): no": "(s3://b/x): no",
    f"for X-Amz-Credential={SECRET}&X-Amz-Date=1": "for X-Amz-Credential=***&X-Amz-Date=1",
    "http://host:90/b, what? me@x.org": "http://host:90/b, what? me@x.org",
    "a = b, s3://bucket/acts/a=b": "a = b, s3://bucket/acts/a=b",
    "abfss://container@account/x": "abfss://container@account/x",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_shown_without_what_is_secret_and_else_as_it_is(text):
    assert redacted(text) == TEXTS[text] == redacted(redacted(text))


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY"]
)
def test_what_the_environment_keeps_secret_is_not_shown(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert redacted(f"signed with {SECRET}") == "signed with ***"
    monkeypatch.setenv(name, "short")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/secrets")
    assert redacted("short of /run/secrets") == "short of /run/secrets"


@pytest.mark.parametrize("name", errors.__all__)
def test_no_error_says_a_secret_and_each_keeps_the_rest(name):
    kind = getattr(errors, name)
    text = f"s3://key:{SECRET}@bucket/acts is wrong"
    for error in (kind(text), pickle.loads(pickle.dumps(kind(text)))):  # noqa: S301 -- ours
        assert str(error) == "s3://***@bucket/acts is wrong"
    if issubclass(kind, OSError):
        error = kind(2, text, f"s3://bucket?sig={SECRET}")
        assert (error.errno, error.strerror, error.filename) == (2, "s3://***@bucket/acts is wrong", "s3://bucket")
        assert SECRET not in str(error) + repr(error)


def test_a_cause_that_says_a_secret_is_told_without_it():
    plain, telling = ValueError("no port"), ValueError(f"http://me:{SECRET}@host")
    assert concealed(plain) is plain
    assert str(concealed(telling)) == "ValueError: http://***@host"
    plain.__cause__ = telling
    assert str(concealed(plain)) == "ValueError: no port"
    plain.__cause__, plain.__context__ = None, plain
    assert concealed(plain) is plain


def everything_said(error):
    """Give all that a traceback says, and the text of every error that is behind one, said or not."""
    out, links = io.StringIO(), [error]
    traceback.print_exception(error, file=out)
    for link in links:
        out.write(f"{link} {link!r} {link.args}")
        links += [other for other in (link.__cause__, link.__context__) if other is not None and other not in links]
    return out.getvalue()


CALLS = {
    "open": lambda url, _: mmcache.open(url),
    "verify": lambda url, _: mmcache.verify(url),
    "push": lambda url, here: mmcache.push(here, url),
    "push from": lambda url, _: mmcache.push(url, "s3://bucket/acts"),
    "pull": lambda url, here: mmcache.pull(url, here / "pulled"),
    "pull to": lambda url, _: mmcache.pull("s3://bucket/acts", url),
    "extract": lambda url, _: mmcache.extract(None, None, ["a"], url),
    "cluster": lambda url, _: mmcache.cluster.extract("m", "t", ["a"], url),
    "export": lambda url, here: mmcache.export(url, here / "out", to="npy"),
    "repair": lambda url, _: mmcache.repair(url),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return remote_stores.make(tmp_path_factory.mktemp("made") / "acts", tokens=20)


@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "url", [f"s3://key:{SECRET}@nowhere/acts?sig={SECRET}", f"https://me:{SECRET}@host/acts", f"hf://{SECRET}@x"]
)
def test_no_call_that_fails_says_a_secret(call, url, made, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 1.0)
    with pytest.raises(Exception) as raised:
        CALLS[call](url, made)
    assert SECRET not in everything_said(raised.value)


@pytest.mark.parametrize("port", ["1", "99999x"])
def test_a_server_that_is_not_there_is_named_without_the_password_to_it(port, monkeypatch, made):
    monkeypatch.setattr(object_store, "PATIENCE", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}+more")
    for call in ("open", "push", "pull", "verify"):
        with pytest.raises(mmcache.MmcacheError, match=r"http://\*\*\*@127\.0\.0\.1") as raised:
            CALLS[call]("s3://bucket/acts", made)
        assert SECRET not in everything_said(raised.value)


def test_a_refusal_does_not_say_the_key(monkeypatch, made):
    with fake_s3.serve_s3(auth=True) as server:
        for name, value in (server.env() | {"AWS_SECRET_ACCESS_KEY": SECRET}).items():
            monkeypatch.setenv(name, value)
        for call in ("open", "push"):
            with pytest.raises(mmcache.AccessError) as raised:
                CALLS[call](f"s3://key:{SECRET}@activations/acts", made)
            assert SECRET not in everything_said(raised.value)


def test_a_store_at_such_an_address_is_shown_by_where_it_is(s3_server, made, monkeypatch):
    without_sync(monkeypatch)
    plain = remote_stores.upload(s3_server, made)
    url = plain.replace("s3://", f"s3://key:{SECRET}@") + f"?sig={SECRET}"
    endpoint = s3_server.endpoint.replace("http://", f"http://me:{SECRET}@")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with mmcache.open(url) as store:
        said = [store.where, store.url, repr(store), store._repr_html_(), repr(store["a"]), repr(vars(store.remote))]
        said += [store.shards("a").where(0, 0), repr(pickle.dumps(store)), str(mmcache.verify(url))]
        assert store.url == plain
        for wrong in (lambda: store["nothing"], lambda: mmcache.verify(url, "no")):
            with pytest.raises(mmcache.MmcacheError) as raised:
                wrong()
            said.append(everything_said(raised.value))
    said.append(str(mmcache.push(made, url)))
    for command in ([url], ["verify", url], ["verify", url, "--json"], ["push", str(made), url], ["show", url, "99"],
                    ["what", url], ["stats", url, url], [f"https://me:{SECRET}@host/acts"]):  # fmt: skip
        done = CliRunner().invoke(main, command)
        said.append(done.output)
    with serving(Source(url)) as page:
        said += [ask(page, path).body.decode() for path in ("/", "/overview.json", "/overview")]
    assert not [text for text in said if SECRET in text]
    assert [text for text in said if plain in text]


def test_what_a_bucket_is_opened_by_says_no_secret():
    where = ObjectStore(f"file:///tmp/acts?{SECRET}")
    assert SECRET not in f"{vars(where)} {where.url} {pickle.dumps(where)}"
