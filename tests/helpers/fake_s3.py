"""An S3 server of our own, and a network before it that fails.

`serve_s3` starts moto in a process; `FaultProxy` stands between it and a client, and at random, the same way for the
same seed, refuses, hangs, cuts, shortens or answers with an error. Neither leaves threads, sockets or processes behind.
"""

import contextlib
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import boto3
import botocore.config

REGION = "us-east-1"
_PIECE = 1 << 18
_HEAD = 1 << 17

# What may befall a request:
KINDS = (
    "close",  # the connection ends before an answer; the server has not seen the request
    "hang",  # no answer for `hang_s` seconds, then the connection ends; the server has not seen the request
    "cut_request",  # the connection ends in the middle of the upload, for the server too
    "cut_response",  # the connection ends in the middle of the answer's body
    "lost",  # the server does what it was asked, and the connection ends before its answer
    "short",  # the answer has half of its bytes, and a Content-Length that says that these are all
    "error_500",  # InternalError, unseen by the server
    "slow_down",  # 503 SlowDown, unseen by the server
    "forbidden",  # 403 AccessDenied, unseen by the server
)
_ERRORS = {
    "error_500": (500, "Internal Server Error", "InternalError", "We encountered an internal error."),
    "slow_down": (503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    "forbidden": (403, "Forbidden", "AccessDenied", "Access Denied"),
}
# Each connection has its own, on either side of us.
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "expect"}


class S3Server:
    """A moto server in a process of its own, with a bucket in it.

    Objects are kept in its memory: `restart` begins with an empty bucket, at the same address.
    """

    def __init__(self, bucket="activations", *, auth=False):
        self.bucket = bucket
        self.host, self.port = "127.0.0.1", 0
        self.access_key, self.secret_key = "testing", "testing"
        self._auth = auth
        self._process = self._client = None
        # A file, as a pipe that nobody reads fills up.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed in `close`
        try:
            self.restart()
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self):
        return f"http://{self.host}:{self.port}"

    def url(self, prefix=""):
        """Give the place of a store below a prefix, as `s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{prefix}".rstrip("/")

    def env(self, endpoint=None):
        """Give the variables by which obstore and boto3 find the server, or a proxy before it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, endpoint=None):
        """Give a boto3 client, which is closed with the server; one of a proxy's endpoint is the caller's to close."""
        if endpoint is not None:
            return self._boto3("s3", endpoint)
        if self._client is None:
            self._client = self._boto3("s3")
        return self._client

    def objects(self, prefix=""):
        """Give every object whose key begins with a prefix, with its bytes."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key: self._read(key) for key in keys}

    def uploads(self):
        """List the keys with a multipart upload that was neither completed nor aborted."""
        found = self.client().list_multipart_uploads(Bucket=self.bucket)
        return [entry["Key"] for entry in found.get("Uploads", ())]

    def clear(self):
        """Delete every object and unfinished upload: much sooner done than a restart."""
        for upload in self.client().list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()):
            self.client().abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        for page in list(pages):
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            # Of several at a time, moto reads the names as XML.
            plain = [{"Key": key} for key in keys if key.isprintable()]
            if plain:
                self.client().delete_objects(Bucket=self.bucket, Delete={"Objects": plain, "Quiet": True})
            for key in keys:
                if not key.isprintable():
                    self.client().delete_object(Bucket=self.bucket, Key=key)

    def log(self):
        """Give what the server wrote on stderr."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def kill(self):
        """End the process at once: connections are refused from here on, and the objects are gone."""
        if self._process is not None:
            self._process.kill()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None

    def restart(self):
        """Start the process (again) at the same port, with the bucket and nothing in it."""
        self.kill()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("moto_process.py")), str(self.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"moto's server did not start: {self.log()}")
        self.port = int(line)
        if self._auth:
            self._make_user()
        self.client().create_bucket(Bucket=self.bucket)

    def close(self):
        """End the process, and close all that belongs to it."""
        self.kill()
        if self._client is not None:
            self._client.close()
        self._log.close()

    def _boto3(self, service, endpoint=None):
        return boto3.client(
            service, endpoint_url=endpoint or self.endpoint, aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key, region_name=REGION,
            config=botocore.config.Config(proxies={}),
        )  # fmt: skip

    def _read(self, key):
        with self.client().get_object(Bucket=self.bucket, Key=key)["Body"] as body:
            return body.read()

    def _make_user(self):
        """Let in one user, who may do all: moto asks for no signature until it is told to."""
        with contextlib.closing(self._boto3("iam")) as iam:
            iam.create_user(UserName="tester")
            everything = '{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}'
            iam.put_user_policy(UserName="tester", PolicyName="everything", PolicyDocument=everything)
            key = iam.create_access_key(UserName="tester")["AccessKey"]
        if self._client is not None:
            self._client.close()
            self._client = None
        self.access_key, self.secret_key = key["AccessKeyId"], key["SecretAccessKey"]
        request = urllib.request.Request(  # noqa: S310 -- our own server
            f"{self.endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(request).close()


@contextlib.contextmanager
def serve_s3(bucket="activations", *, auth=False):
    """Run an S3 server with an empty bucket; with `auth`, only who signs with its key is let in (403 otherwise).

    It takes a second or two to start: one a session, `clear`ed or with a prefix a test, is what a fixture should give.
    """
    server = S3Server(bucket, auth=auth)
    try:
        yield server
    finally:
        server.close()


@dataclass
class Request:
    """What a client asked the proxy for, and what became of it."""

    method: str
    # With the query, and without percent signs.
    target: str
    range: str | None
    fault: str | None = None
    # Of the answer, None where there was none.
    status: int | None = None
    # Bytes of the answer's body, as far as they were sent.
    sent: int = 0

    def matches(self, method, substring):
        return method in (None, self.method) and substring in self.target


@dataclass
class _Planned:
    """A fault that comes at a request set beforehand."""

    kind: str
    method: str | None
    substring: str
    skip: int
    count: int


class FaultProxy:
    """An HTTP proxy before `upstream_host:upstream_port` that fails requests, each kind with its own probability.

    `rates` maps kinds (see `KINDS`) to probabilities. Whether a request fails depends on the seed, on its method,
    target and range, and on how often that was asked for before, so not on which of several threads came first. A kind
    that cannot befall a request (a body cut short that has no bytes) leaves it alone.
    """

    def __init__(self, upstream_host, upstream_port, seed=0, *, rates=None, hang_s=1.0, delay_s=0.0):
        self.host, self.port = "127.0.0.1", 0
        self.hang_s = hang_s
        # Before every request is passed on: how far away the server is.
        self.delay_s = delay_s
        self.requests = []
        self._upstream = (upstream_host, upstream_port)
        self._seed = seed
        self._on = True
        self._planned = []
        self._seen = Counter()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._sockets = set()
        self._threads = set()
        self._listening = None
        self.set_rates(**(rates or {}))
        self.aim()
        self.up()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def endpoint(self):
        return f"http://{self.host}:{self.port}"

    # What goes wrong.

    def set_rates(self, **rates):
        """Set the probability of each kind; those not named are 0."""
        unknown = set(rates) - set(KINDS)
        if unknown or sum(rates.values()) > 1:
            raise ValueError(f"kinds are {KINDS}, and their probabilities add up to at most 1: {rates}")
        self._rates = dict(rates)

    def aim(self, method=None, substring=""):
        """Let random faults meet only requests of a method and with this in their path or query; no arguments, all."""
        self._aim = (method, substring)

    def plan(self, kind, method=None, substring="", *, skip=0, count=1):
        """Fail `count` matching requests that the kind can befall, after `skip` of them, whatever chance says."""
        if kind not in KINDS:
            raise ValueError(f"kinds are {KINDS}: {kind}")
        with self._lock:
            self._planned.append(_Planned(kind, method, substring, skip, count))

    def faults(self, on):
        """Switch faults on or off, planned ones too."""
        self._on = on

    def down(self):
        """Refuse connections, and end those there are."""
        listening, self._listening = self._listening, None
        if listening is None:
            return
        # A closed socket does not wake who waits for it.
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        self._accepting.join()
        self._end_connections()

    def up(self):
        """Take connections (again), at the same port."""
        if self._listening is None:
            self._listening = socket.create_server((self.host, self.port), backlog=128)
            self.port = self._listening.getsockname()[1]
            self._accepting = threading.Thread(target=self._accept, args=(self._listening,), name="proxy", daemon=True)
            self._accepting.start()

    def close(self):
        """End every connection and wait for the threads."""
        self._ending.set()
        self.down()
        while self._threads:
            # Again and again: a request that was being passed on may have connected to the server since.
            self._end_connections()
            with self._lock:
                left = list(self._threads)
            for thread in left:
                thread.join(timeout=0.1)

    # What went on.

    def n_requests(self, method=None, substring=""):
        """Count requests of a method with a text in their path or query, failed ones too."""
        with self._lock:
            return sum(request.matches(method, substring) for request in self.requests)

    def met(self):
        """Count faults by kind."""
        with self._lock:
            return Counter(request.fault for request in self.requests if request.fault)

    def bytes_sent(self, method=None, substring=""):
        """Count bytes of answers' bodies sent to clients."""
        with self._lock:
            return sum(request.sent for request in self.requests if request.matches(method, substring))

    def reset(self):
        """Forget requests, planned faults and how often each was asked for."""
        with self._lock:
            self.requests.clear()
            self._planned.clear()
            self._seen.clear()

    # How it is done.

    def _accept(self, listening):
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), name="proxy connection", daemon=True)
            with self._lock:
                self._threads.add(thread)
                self._sockets.add(sock)
            thread.start()

    def _end_connections(self):
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _serve(self, sock):
        stream = _Stream(sock)
        try:
            # Whichever side ends a connection, the other sees it ended.
            with contextlib.suppress(OSError, EOFError):
                while self._one_request(stream):
                    pass
        finally:
            self._forget(sock)
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _forget(self, sock):
        # Under the lock: `down` must not shut down a number that was given to another socket meanwhile.
        with self._lock:
            self._sockets.discard(sock)
            sock.close()

    def _one_request(self, client):
        """Answer a request; tell whether the connection goes on."""
        head = client.head()
        if head is None:
            return False
        method, target, _ = head.first.split(" ", 2)
        request = Request(method, urllib.parse.unquote(target), head.get("range"))
        has_body = head.chunked or head.length > 0
        kind = self._fault(request, has_body=has_body)
        if self.delay_s:
            self._ending.wait(self.delay_s)
        if kind == "close":
            self._note(request, kind)
            client.reset()
            return False
        if kind == "hang":
            self._note(request, kind)
            self._ending.wait(self.hang_s)
            return False
        expects = head.get("expect", "").lower() == "100-continue"
        keep = head.get("connection", "").lower() != "close"
        if kind in _ERRORS:
            self._note(request, kind)
            if has_body and not expects:
                for _ in client.body(head):
                    pass
            request.status, request.sent = _ERRORS[kind][0], client.send_error(method, *_ERRORS[kind])
            return keep and not (has_body and expects)
        if expects:
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._forward(client, head, request, kind) and keep

    def _forward(self, client, head, request, kind):
        """Pass a request on, and its answer back; tell whether the client's connection can go on."""
        sock = socket.create_connection(self._upstream)
        with self._lock:
            self._sockets.add(sock)
        try:
            upstream = _Stream(sock)
            upstream.send(head.text({"Connection": "close"}))
            half = max(head.length, 2) // 2
            done = 0
            for piece in client.body(head):
                if kind == "cut_request" and done + len(piece) > half:
                    self._note(request, kind)
                    upstream.send(piece[: half - done])
                    upstream.reset()
                    client.reset()
                    return False
                upstream.send(piece)
                done += len(piece)
            answer = upstream.head()
            while answer is not None and answer.status < 200:
                answer = upstream.head()
            if answer is None:
                return False
            if kind == "lost":
                # Only now is it sure that the server has done it.
                for _ in upstream.body(answer, request.method):
                    pass
                self._note(request, kind)
                client.reset()
                return False
            return self._answer(client, upstream, answer, request, kind)
        finally:
            self._forget(sock)

    def _answer(self, client, upstream, answer, request, kind):
        limit = None
        if kind in ("short", "cut_response") and answer.status in (200, 206) and answer.length > 1:
            self._note(request, kind)
            limit = answer.length // 2
        request.status = answer.status
        until_close = answer.length < 0 and not answer.chunked and upstream.has_body(answer, request.method)
        changed = {"Connection": "close" if until_close else "keep-alive"}
        if kind == "short" and limit is not None:
            changed["Content-Length"] = str(limit)
        text = answer.text(changed)
        for piece in upstream.body(answer, request.method):
            part = piece if limit is None else piece[: limit - request.sent]
            # In one packet with what is at hand of the body.
            client.send(text + part if text else part)
            text = b""
            request.sent += len(part)
            if request.sent == limit:
                break
        if text:
            client.send(text)
        if kind == "cut_response" and limit is not None:
            return False
        return not until_close

    def _note(self, request, kind):
        with self._lock:
            request.fault = kind

    def _fault(self, request, *, has_body):
        """Choose what befalls a request."""
        with self._lock:
            self.requests.append(request)
            # An upload's name is another each time.
            target = re.sub(r"uploadId=[^&]*", "", request.target)
            name = (request.method, target, request.range)
            self._seen[name] += 1
            if not self._on:
                return None
            possible = {"cut_request": has_body}
            possible["short"] = possible["cut_response"] = request.method == "GET"
            for planned in self._planned:
                if not request.matches(planned.method, planned.substring) or not possible.get(planned.kind, True):
                    continue
                if planned.skip:
                    planned.skip -= 1
                elif planned.count:
                    planned.count -= 1
                    return planned.kind
            if not request.matches(*self._aim):
                return None
            left = random.Random(f"{self._seed} {name} {self._seen[name]}").random()  # noqa: S311
        for kind, rate in self._rates.items():
            left -= rate
            if left < 0:
                return kind if possible.get(kind, True) else None
        return None


class _Head:
    """The first line and the headers of a request or an answer, as they came."""

    def __init__(self, data):
        self.first, *lines = data.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.headers = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
        self.chunked = "chunked" in self.get("transfer-encoding", "").lower()
        self.length = int(self.get("content-length", -1))

    @property
    def status(self):
        return int(self.first.split(" ", 2)[1])

    def get(self, name, default=None):
        return next((value for key, value in self.headers if key.lower() == name), default)

    def text(self, changed):
        """Write it anew, in the same order, as signatures have it, and with some headers changed."""
        without = _HOP_BY_HOP | {name.lower() for name in changed}
        headers = [header for header in self.headers if header[0].lower() not in without] + list(changed.items())
        return "\r\n".join([self.first, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("latin-1")


class _Stream:
    """A connection, read by the piece and never further than the message at hand needs."""

    def __init__(self, sock):
        self._sock = sock
        self._held = b""
        # The rest of an answer would wait 40 ms for the acknowledgement of its beginning.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data):
        self._sock.sendall(data)

    def send_error(self, method, status, reason, code, message):
        """Send an error as S3 words it; give the length of its body."""
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        # What a HEAD is told has no body.
        body = b"" if method == "HEAD" else body.encode()
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.send(head.encode() + body)
        return len(body)

    def reset(self):
        """End the connection so that the other side gets an error, not an end of file."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def head(self):
        """Read up to the end of the headers; None where the other side has ended the connection before the first."""
        while (end := self._held.find(b"\r\n\r\n")) < 0:
            data = self._sock.recv(_PIECE)
            if not data or len(self._held) > _HEAD:
                if self._held:
                    raise EOFError
                return None
            self._held += data
        data, self._held = self._held[: end + 4], self._held[end + 4 :]
        return _Head(data)

    @staticmethod
    def has_body(head, method):
        return method != "HEAD" and head.status not in (204, 304)

    def body(self, head, method=None):
        """Give a body by the piece, chunks as they are framed; of an answer where the request's method is given."""
        if method is not None and not self.has_body(head, method):
            return
        if head.chunked:
            yield from self._chunks()
        elif head.length >= 0:
            yield from self._exactly(head.length)
        elif method is not None:
            while data := self._some(_PIECE):
                yield data

    def _some(self, size):
        if self._held:
            data, self._held = self._held[:size], self._held[size:]
            return data
        return self._sock.recv(min(size, _PIECE))

    def _exactly(self, size):
        while size:
            data = self._some(size)
            if not data:
                raise EOFError
            size -= len(data)
            yield data

    def _line(self):
        while (end := self._held.find(b"\r\n")) < 0:
            data = self._sock.recv(_PIECE)
            if not data:
                raise EOFError
            self._held += data
        line, self._held = self._held[: end + 2], self._held[end + 2 :]
        return line

    def _chunks(self):
        while True:
            line = self._line()
            yield line
            size = int(line.split(b";")[0], 16)
            if not size:
                break
            yield from self._exactly(size + 2)
        # Trailers, if any, up to an empty line.
        while (line := self._line()) != b"\r\n":
            yield line
        yield line
