"""Serve moto's S3 for `fake_s3.serve_s3`: an answer in one packet, objects in memory, writes one at a time.

moto's own `moto_server` sends a body after its headers through Nagle's algorithm, which waits for the client's delayed
acknowledgement (40 ms an answer), and reads a whole object from a temporary file for each range of it.
"""

import os
import sys
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import FakeKey
from moto.s3.responses import S3Response
from werkzeug.serving import make_server


class _Handler(MotoRequestHandler):
    """One buffered write an answer, and no line on stderr for each."""

    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    protocol_version = "HTTP/1.1"

    def handle_expect_100(self):
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()  # the client sends no body before it sees this
        # run_wsgi would say it a second time, behind our back in the buffer.
        del self.headers["Expect"]
        return True

    def log_request(self, *_):
        pass


def _in_memory():
    """Keep a key's bytes as they came: moto spools them to a file and copies all of them for a range."""
    held = FakeKey.value

    def set_value(key, value):
        held.fset(key, value)
        key.held_value = value.encode() if isinstance(value, str) else bytes(value)

    FakeKey.value = property(lambda key: key.held_value, set_value)


def _atomic():
    """Let one write at a time through: moto looks whether a key is there, then writes it, and S3 does both at once."""
    respond = S3Response._key_response
    lock = threading.Lock()

    def one_at_a_time(response, request, url):
        # Bodies have been received by now, so that a slow client holds up nobody.
        if request.method in ("GET", "HEAD"):
            return respond(response, request, url)
        with lock:
            return respond(response, request, url)

    S3Response._key_response = one_at_a_time


def main():
    _in_memory()
    _atomic()
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True, request_handler=_Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)  # noqa: T201 -- how the parent learns the port
    # The parent holds the other end: when it ends, however it ends, so does this.
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
