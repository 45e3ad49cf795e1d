"""
URLs at the endpoint: fetched from public addresses only, within limits.

`pytest -s tests/hub/test_handler_urls.py -k answered` prints the table of URLs and answers.
"""

import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from gap_closed_clip.hub.reload import HUB, MODEL

from .conftest import HANDLER, load_handler


NOT_PUBLIC = "inputs: the URL leads to an address that is not public."


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


class _Pictures(BaseHTTPRequestHandler):
    """A picture, redirects, and what a hostile server does."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        redirects = {
            "/moved": "/a.png",
            "/loop": "/loop",
            "/inside": f"http://127.0.0.2:{self.server.server_port}/a.png",
            "/file": "file:///etc/passwd",
            "/ftp": "ftp://127.0.0.1/a.png",
        }
        bodies = {"/a.png": picture(), "/page": b"<html>", "/large": bytes(1_000)}
        self.server.asked.append((self.path, self.headers["Host"]))
        if path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[path])
        else:
            self.send_response(404 if path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(bodies.get(path, b""))
        if path == "/slow":
            self._drip()

    def _drip(self):
        """A byte at a time, until the client hangs up."""
        try:
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> tuple[types.ModuleType, types.ModuleType]:
    folder = tmp_path_factory.mktemp("model")
    for path in (*(HUB / name for name in HANDLER), MODEL / "images_gap_closed_clip.py"):
        shutil.copy(path, folder)
    return load_handler(folder)


@pytest.fixture(scope="module")
def handler(modules) -> types.ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def handler_images(modules) -> types.ModuleType:
    return modules[1]


@pytest.fixture
def endpoint(handler):
    """One that fetches, without a model: it answers with what is wrong, and never gets to embeddings."""
    endpoint = object.__new__(handler.EndpointHandler)
    endpoint.allow_urls, endpoint.tasks = True, ["embeddings"]
    endpoint.processor = lambda images, return_tensors: {"pixel_values": images}
    return endpoint


@pytest.fixture
def loopback(handler_images, monkeypatch) -> None:
    """Lets this one address count as public."""
    is_public = handler_images._is_public
    monkeypatch.setattr(handler_images, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print("\n| image | answer |\n| --- | --- |", *(f"| {url} | `{answer}` |" for url, answer in rows), sep="\n")


def ask(endpoint, url: str) -> dict:
    return endpoint({"inputs": url, "parameters": {"task": "embeddings"}})


def _lookup(monkeypatch, *answers: list[str]) -> list[str]:
    """What names lead to, one lookup after the other; gives the names that are looked up."""
    looked_up = []

    def lookup(host, port, *args, **kwargs):
        if host[0].isdigit():  # what a connection itself asks for
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers[len(looked_up) - 1]]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return looked_up


@pytest.mark.parametrize("path", ["/a.png", "/moved", "/a.png?size=1"])
def test_a_picture_is_fetched(endpoint, handler, loopback, server, path):
    url = f"http://127.0.0.1:{server.server_port}{path}"
    (fetched,) = endpoint._pixels(handler.Item("image", url, "inputs"))
    assert fetched.tobytes() == Image.open(io.BytesIO(picture())).tobytes()
    last = ("/a.png" if path == "/moved" else path, f"127.0.0.1:{server.server_port}")
    assert server.asked[-1] == last and len(server.asked) == 1 + (path == "/moved")


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/missing", 400, "inputs: the URL answers with status 404."),
        ("/loop", 400, "inputs: the URL answers with status 302."),
        ("/page", 400, "inputs is no image file of a known format: PNG, JPEG, JPEG2000, TIFF, BMP, GIF, WEBP, PPM."),
        ("/large", 413, "inputs is too large: an image file may have 0 MiB."),
        ("/slow", 400, "inputs: the URL can't be fetched, or not within 0.5 s."),
        ("/inside", 403, NOT_PUBLIC),
        ("/file", 403, "inputs: the URL is neither http nor https."),
        ("/ftp", 403, "inputs: the URL is neither http nor https."),
    ],
)
def test_a_bad_url_is_answered(endpoint, handler_images, loopback, server, table, monkeypatch, path, status, message):
    monkeypatch.setattr(handler_images, "MAX_IMAGE_BYTES", 500)
    monkeypatch.setattr(handler_images, "FETCH_SECONDS", 0.5)
    url, start = f"http://127.0.0.1:{server.server_port}{path}", time.monotonic()
    answer = ask(endpoint, url)
    table.append((url, answer))
    assert answer == {"error": message, "status": status}
    assert time.monotonic() - start < 5
    assert len(server.asked) == (1 + handler_images.MAX_REDIRECTS if path == "/loop" else 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0", "2130706433", "[::ffff:127.0.0.1]"])
def test_this_machine_is_refused_as_answered(endpoint, server, table, host):
    url = f"http://{host}:{server.server_port}/a.png"
    answer = ask(endpoint, url)
    table.append((url, answer))
    assert answer == {"error": NOT_PUBLIC, "status": 403}
    assert server.asked == []


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a:b/", "http://127.0.0.1:1/a", "http://\x00/"])
def test_a_url_that_leads_nowhere_is_answered(endpoint, loopback, table, url):
    answer = ask(endpoint, url)
    table.append((url, answer))
    assert answer["error"].startswith("inputs: the URL ") and answer["status"] in (400, 403)


def test_a_name_is_looked_up_once(endpoint, handler_images, loopback, server, monkeypatch):
    """It may lead elsewhere a moment after its address was checked."""
    looked_up = _lookup(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    url = f"http://pictures.example:{server.server_port}/a.png"
    assert handler_images._fetch(url, "inputs") == picture()
    assert looked_up == ["pictures.example"]
    assert server.asked == [("/a.png", f"pictures.example:{server.server_port}")]


def test_a_name_may_have_no_private_address_beside_a_public_one(endpoint, loopback, server, monkeypatch):
    _lookup(monkeypatch, ["127.0.0.1", "10.0.0.1"])
    answer = ask(endpoint, f"http://pictures.example:{server.server_port}/a.png")
    assert answer == {"error": NOT_PUBLIC, "status": 403} and server.asked == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_over_tls_the_name_has_to_be_the_certificates(
    endpoint, handler_images, loopback, server, tmp_path, monkeypatch
):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate} -subj /CN=pictures"
    names = ["-addext", "subjectAltName=DNS:pictures.example"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    _lookup(monkeypatch, ["127.0.0.1"], ["127.0.0.1"])
    assert handler_images._fetch(f"https://pictures.example:{server.server_port}/a.png", "inputs") == picture()
    answer = ask(endpoint, f"https://other.example:{server.server_port}/a.png")
    assert answer == {"error": "inputs: the URL can't be fetched, or not within 10 s.", "status": 400}
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.251", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("::ffff:224.0.0.251", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
        ("ff02::1", False),
        ("ff0e::1", False),
    ],
)
def test_what_is_public(handler_images, address, public):
    assert handler_images._is_public(address) is public
