"""Who may ask the page: its own user, with the secret; what others can do to it is little."""

import contextlib
import http.client
import json
import re
import secrets
import socket
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="the page needs mmcache[view]")
pytest.importorskip("plotly", reason="the page needs mmcache[view]")

from damaged_stores import extracted
from mmcache.view.access import Access
from mmcache.view.figures import plotly_js
from mmcache.view.panels import Source
from mmcache.view.server import LimitedConnection
from page_requests import ask, bearer, serving
from stores_and_processes import wait_for

DATA = ["/page.json", "/overview.json", "/norms.json", "/nothing.json", "/nothing"]
OPEN = ["/", "/page.css", "/page.js", "/access.js", "/plotly.js"]
REFUSED = b"refused: open an address that `mmcache view` printed; each is good once, then the next one is printed\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    extracted(folder / "secretive-name", sites=("mlp_in",))
    return folder / "secretive-name"


@pytest.fixture(scope="module")
def page(path):
    with serving(Source(path)) as page:
        yield page


def token_of(page, used=lambda: None):
    return re.fullmatch(rf"http://127\.0\.0\.1:{page.port}/#token=([\w-]{{43}})", page.one_time_url(used)).group(1)


# The secret, and what is exchanged for it.


def test_only_the_loopback_address_is_listened_to(page):
    assert page._socket.getsockname()[0] == "127.0.0.1"
    assert page.root == f"http://127.0.0.1:{page.port}/"


@pytest.mark.parametrize("where", DATA)
def test_without_the_secret_no_data_come(page, where):
    secret = page.access.secret
    right = bearer(secret)["Authorization"]
    schemes = (right.lower(), f"Basic {secret}", secret)
    for said in ("", "x", right[:-1], right + "x", "Bearer é\xff", *schemes):
        assert ask(page, where, secret=False, Authorization=said).status == 403
    # Neither in the address nor in a cookie: both get to others.
    for name in ("token", "secret", "mmcache-secret", f"mmcache-{page.port}"):
        assert ask(page, where, secret=False, Cookie=f"{name}={secret}").status == 403
        assert ask(page, f"{where}?{name}={secret}", secret=False).status == 403
    # A token opens nothing but the exchange, and is not used up here.
    token = token_of(page)
    assert ask(page, where, secret=False, **bearer(token)).body == REFUSED
    assert ask(page, "/session", method="POST", secret=False, **bearer(token)).status == 200


@pytest.mark.parametrize("where", OPEN)
def test_the_pages_own_files_have_nothing_of_the_store_and_set_no_cookie(page, path, where):
    answer = ask(page, where, secret=False)
    assert answer.status == 200
    assert path.name.encode() not in answer.body
    assert page.access.secret.encode() not in answer.body
    assert "set-cookie" not in answer.headers


def test_a_token_is_exchanged_for_the_secret_once(page):
    used = []
    token, other = token_of(page, lambda: used.append(1)), token_of(page)
    for wrong in ("", token[:-1], token + "x", page.access.secret, "é"):
        assert ask(page, "/session", method="POST", secret=False, **bearer(wrong)).status == 403
    for method in ("GET", "HEAD", "PUT", "OPTIONS"):
        answer = ask(page, "/session", method=method, secret=False, **bearer(token))
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert ask(page, f"/session?token={token}", method="POST", secret=False).status == 403
    assert not used
    answer = ask(page, "/session", method="POST", secret=False, **bearer(token))
    assert (answer.status, json.loads(answer.body)) == (200, {"secret": page.access.secret})
    assert answer.headers["cache-control"] == "no-store"
    assert "set-cookie" not in answer.headers
    assert used == [1]
    for method in ("POST", "GET"):
        assert ask(page, "/session", method=method, secret=False, **bearer(token)).status in {403, 405}
    assert ask(page, "/page.json").status == 200
    assert ask(page, "/session", method="POST", secret=False, **bearer(other)).status == 200


def test_what_is_compared_is_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    access = Access()
    token = access.one_time_token(lambda: None)
    monkeypatch.setattr(secrets, "compare_digest", compare)
    assert not access.admits(["Bearer wrong"])
    assert access.exchange(["Bearer wrong"]) is None
    assert compared == [(b"Bearer wrong", f"Bearer {one}".encode()) for one in (access.secret, token)]
    assert not access.admits([])
    assert not access.admits([f"Bearer {access.secret}"] * 2)


def test_each_page_has_its_own_secret(page, path):
    with serving(Source(path)) as other:
        assert ask(other, "/page.json", secret=False, **bearer(page.access.secret)).status == 403


# Other names, other sites.


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "LOCALHOST:{}", "[::1]:{}"])
def test_our_own_names_are_answered(page, host):
    assert ask(page, "/page.json", Host=host.format(page.port)).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example:{}", "evil.example", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{}", "", "::1"]
)
def test_a_name_that_was_pointed_at_us_is_refused(page, host):
    for where in ("/page.json", "/", "/page.js"):
        assert ask(page, where, Host=host.format(page.port)).status in {400, 403}
    token = token_of(page)
    assert ask(page, "/session", method="POST", **bearer(token), Host=host.format(page.port)).status in {400, 403}


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{}", ""])
def test_another_origin_is_refused(page, origin):
    for where in ("/page.json", "/", "/page.js"):
        assert ask(page, where, Origin=origin.format(page.port)).status == 403
    token = token_of(page)
    assert ask(page, "/session", method="POST", **bearer(token), Origin=origin.format(page.port)).status == 403


def test_our_own_origin_is_answered(page):
    assert ask(page, "/page.json", Origin=f"http://127.0.0.1:{page.port}", Sec_Fetch_Site="same-origin").status == 200


def test_requests_that_other_sites_make_are_refused_but_for_a_link_that_is_followed(page):
    for site in ("cross-site", "same-site", "nonsense"):
        for where in ("/page.json", "/", "/page.js", "/plotly.js"):
            assert ask(page, where, Sec_Fetch_Site=site).status == 403
            assert ask(page, where, Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors").status == 403
        # The page, the same for everybody: also where data are opened in a tab, for which it asks with the secret.
        followed = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "navigate", "secret": False}
        for where in ("/", "/?panel=health", "/page.json", "/norms.json?site=mlp_in"):
            assert ask(page, where, **followed).body == ask(page, "/", secret=False).body
        assert ask(page, "/nothing", **followed).status == 403
        assert ask(page, "/session", method="POST", **followed).status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_it_only_shows(page, method):
    for where in ("/", "/norms.json", "/page.css"):
        for secret in (True, False):
            answer = ask(page, where, method=method, secret=secret, Content_Length="0")
            assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "where", ["/", "/page.css", "/page.js", "/norms.json", "/norms.json?bins=0", "/plotly.js", "/no", "/session"]
)
def test_every_answer_says_what_may_run(page, where):
    for answer in (ask(page, where), ask(page, where, secret=False), ask(page, where, method="POST")):
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
            "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cache-control"] == (
            "private, max-age=31536000, immutable" if answer.body[:2] == b"/*" else "no-store"
        )
        assert (answer.headers["connection"] == "close") is (answer.status >= 400)


def test_head_says_what_get_would_and_sends_nothing(page):
    for where in ("/page.css", "/norms.json", "/plotly.js"):
        head, got = ask(page, where, method="HEAD"), ask(page, where)
        assert head.body == b""
        assert head.status == got.status == 200
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.body))


@pytest.mark.parametrize(
    "where",
    ["/../server.py", "/..%2fserver.py", "/static/page.js", "/%2e%2e/panels.py", "//etc/passwd", "/server.py", "/.js"],
)
def test_no_file_but_the_pages_own_comes(page, where):
    assert ask(page, where).status == 404
    assert ask(page, where, secret=False).status == 403


# Those who send without end, or not at all.

HEAD = "GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n"


@pytest.fixture
def hurried(page, monkeypatch):
    """The page, with little patience."""
    assert 2 <= LimitedConnection.patience <= 10
    assert LimitedConnection.stalled <= 30
    monkeypatch.setattr(LimitedConnection, "patience", 0.5)
    monkeypatch.setattr(LimitedConnection, "stalled", 0.5)
    return page


@contextlib.contextmanager
def connected(page, said=b"", count=1):
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", page.port), 20)) for _ in range(count)]
        for one in made:
            # Those that came first may be cut already.
            with contextlib.suppress(ConnectionError):
                one.sendall(said)
        yield made


def end_of(connection):
    """What is still read, when the other end closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(1 << 20):
            found += more
    return found


def is_open(connection):
    connection.settimeout(0)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@pytest.mark.parametrize("said", [b"", b"G", HEAD.encode(), HEAD.encode() + b"X: " + b"y" * 4000])
def test_half_a_request_is_not_waited_for(hurried, said):
    began = time.monotonic()
    with connected(hurried, said) as (one,):
        assert end_of(one) == b""
        assert time.monotonic() - began > 0.3


def test_a_request_that_comes_letter_by_letter_is_not_waited_for(hurried):
    for before in (b"", HEAD.format(hurried.port).encode() + b"\r\n"):
        with connected(hurried, before) as (one,):
            if before:
                assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
            with pytest.raises(ConnectionError):  # noqa: PT012 -- whichever letter finds it out
                while time.monotonic() - began < 60:
                    one.sendall(b"G")
                    time.sleep(0.1)
                pytest.fail("it may go on for ever")


def test_hundreds_of_half_requests_are_cut_while_the_user_is_served(page, monkeypatch):
    # More than the test takes, however busy the machine is: those that are cut are too many, and not too slow.
    monkeypatch.setattr(LimitedConnection, "patience", 60.0)
    with connected(page, HEAD.encode(), 500) as made:
        assert ask(page, "/norms.json").status == 200
        assert ask(page, "/plotly.js", secret=False).status == 200
        left = [one for one in made if is_open(one)]
        assert len(left) <= LimitedConnection.most
        # The newest: those who come now get a chance to ask.
        assert made[-1] in left
        assert made[0] not in left
    wait_for(lambda: not page._server.server_state.connections)


def test_a_connection_that_had_the_secret_outlives_those_of_others(page):
    kept = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    with contextlib.closing(kept):
        # The second request on it has no secret, as for the page's own files.
        for where, headers in (("/page.json", bearer(page.access.secret)), ("/page.css", {})):
            kept.request("GET", where, headers=headers)
            kept.getresponse().read()
        before = kept.sock
        with connected(page, HEAD.encode(), 2 * LimitedConnection.most):
            kept.request("GET", "/page.css")
            assert kept.getresponse().status == 200
            assert kept.sock is before


@contextlib.contextmanager
def slow_readers(page, count=1):
    """Connections on which plotly.js was asked for, and of which little is read by itself."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for one in made:
            one.settimeout(20)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", page.port))
            one.sendall(f"GET /plotly.js HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n".encode())
        yield made


def test_answers_that_are_not_read_do_not_end_those_of_the_user(page):
    with slow_readers(page, 2 * LimitedConnection.most) as made:
        assert ask(page, "/norms.json").status == 200
        assert ask(page, "/page.js", secret=False).status == 200
        assert len(page._server.server_state.connections) <= 2 * LimitedConnection.most
        assert not end_of(made[0]).endswith(plotly_js()[1][-100:])


def test_an_answer_that_is_not_read_takes_little_memory(page):
    def held():
        return [one.transport.get_write_buffer_size() for one in list(page._server.server_state.connections)]

    with slow_readers(page):
        wait_for(lambda: any(held()))
        time.sleep(0.1)  # more may come
        assert max(held()) <= 1 << 18


def test_an_answer_that_is_not_read_is_cut(hurried):
    with slow_readers(hurried) as (one,):
        # What it says meanwhile is no sign that it reads.
        for _ in range(5):
            time.sleep(0.3)
            with contextlib.suppress(ConnectionError):
                one.sendall(b"GET")
        assert len(end_of(one)) < len(plotly_js()[1])


@pytest.mark.parametrize("framing", [f"Content-Length: {500 << 20}", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("where", ["/", "/page.json", "/session"])
@pytest.mark.parametrize("known", [True, False])
def test_a_body_is_refused_before_it_is_read(page, framing, where, known):
    said = f"POST {where} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n{framing}\r\n"
    said += f"Authorization: Bearer {page.access.secret}\r\n\r\n" if known else "\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n" if "chunked" in framing else b"x" * 65536
    with connected(page, said.encode()) as (one,):
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012 -- whichever piece finds it out
            while sent < 500 << 20:
                one.sendall(piece)
                sent += len(piece)
            pytest.fail("all of it was taken")
    assert sent < 32 << 20


def test_a_body_is_refused_with_a_sentence(page):
    for headers in ({"Content_Length": "10"}, {"Transfer_Encoding": "chunked"}):
        answer = ask(page, "/", method="POST", secret=False, **headers)
        assert (answer.status, answer.body) == (413, b"this page takes no body\n")
        assert answer.headers["connection"] == "close"
    # Nor is it asked for by those who wait to be told to send it.
    assert ask(page, "/", method="POST", Content_Length="10", Expect="100-continue").status == 413


def test_headers_without_end_are_refused(page):
    with connected(page, HEAD.encode()) as (one,):
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012 -- whichever line finds it out
            while sent < 16 << 20:
                one.sendall(b"X-More: " + b"y" * 8000 + b"\r\n")
                sent += 8010
            pytest.fail("all of them were taken")


def test_what_others_send_is_not_said_on_the_terminal(page, caplog, capfd):
    upgrade = "GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for said in (b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n", upgrade.format(page.port).encode(), b"GET " * 9999):
        with connected(page, said) as (one,):
            one.shutdown(socket.SHUT_WR)
            end_of(one)
    assert ask(SimpleNamespace(port=page.port, access=page.access), "/page.json").status == 200
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")
