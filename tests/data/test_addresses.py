"""Addresses in place of images: a data set's own are not opened unless asked, and then on public servers alone."""

import http.server
import threading

import pytest
from huggingface_hub.constants import ENDPOINT

from gap_closed_clip.data import DataArguments, load_checked_pairs, load_pairs
from gap_closed_clip.data.addresses import check_address, is_of_hub


@pytest.fixture
def table(tmp_path):
    """table("http://...") -> the arguments of a table whose second image is that."""
    (tmp_path / "0.ppm").write_bytes(b"P5 2 2 255\n" + bytes(4))

    def write(address: str, **kwargs) -> DataArguments:
        path = tmp_path / "pairs.csv"
        path.write_text(f"image,caption\n0.ppm,one\n{address},two\n", encoding="utf-8")
        return DataArguments(source=str(path), **kwargs)

    return write


@pytest.fixture
def server():
    """The address of an image on a server of this machine, and the requests that came."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"P5 2 2 255\n" + bytes(4))

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/x.ppm", asked
        running.shutdown()


OURS = [
    "hf://datasets/owner/name@main/x.png",
    "zip://a/x.png::hf://datasets/owner/name/images.zip",
    "gzip://x.png::hf://datasets/owner/name/x.png.gz",
    f"{ENDPOINT}/datasets/owner/name/resolve/main/x.png",
    f"zip://x.png::{ENDPOINT}/datasets/owner/name/resolve/main/x.zip",
    "zip://x.png::/data/images.zip",
]
STRANGE = [
    "file:///etc/passwd",
    "file:/etc/passwd",
    "FILE:///etc/passwd",
    "ftp://localhost/x.png",
    "ssh://localhost/x.png",
    "simplecache::file:///etc/passwd",
    "simplecache::http://localhost/x.png",
    "zip://x.png::file:///data/images.zip",
    "zip://x.png::http://localhost/images.zip",
    "file:///etc/passwd::hf://datasets/owner/name/x.zip",
    "s3://bucket/x.png",
]
WEB = ["http://localhost/x.png", "https://localhost/x.png", "HTTPS://localhost/x.png", f"{ENDPOINT}.evil.org/x.png"]


@pytest.mark.parametrize("address", OURS)
def test_what_streaming_makes_is_opened(address):
    assert is_of_hub(address)
    check_address(address, allow_urls=False)


@pytest.mark.parametrize("address", [*STRANGE, *WEB])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_address_is_refused_with_its_row(address, streaming, table):
    assert not is_of_hub(address)
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): '") as error:
        list(load_pairs(table(address, streaming=streaming, shuffle_buffer=0), "train"))
    assert address in str(error.value) and "pairs.csv" in str(error.value)
    asks = "data.allow_urls=true" in str(error.value)
    assert asks == (address in WEB)


@pytest.mark.parametrize("address", STRANGE)
def test_some_are_never_opened(address, table):
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): .* is an address that is never opened"):
        load_pairs(table(address, allow_urls=True), "train")


def test_an_address_of_a_modality_is_refused_with_its_row(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("lateral,caption\nhttp://localhost/x.png,one\n", encoding="utf-8")
    arguments = DataArguments(source=str(path), image_column=None, modalities={"lateral": "lateral"})
    with pytest.raises(ValueError, match=r"Row 0 \(from 0\), 'lateral': 'http://localhost/x.png' is an address"):
        load_pairs(arguments, "train")


def test_nobody_is_asked_without_a_yes(table, server):
    address, asked = server
    with pytest.raises(ValueError, match="data.allow_urls=true"):
        load_checked_pairs(table(address), "train")
    assert not asked


def test_with_a_yes_public_servers_alone_are_asked(table, server):
    address, asked = server
    with pytest.raises(ValueError, match="127.0.0.1, no public address") as error:
        load_checked_pairs(table(address, allow_urls=True), "train")
    assert not asked and address in str(error.value)


def test_with_a_yes_an_image_is_fetched(table, monkeypatch):
    asked = []

    def fetch(url: str, public_only: bool) -> bytes:
        asked.append((url, public_only))
        return b"P5 2 2 255\n" + bytes(4)

    monkeypatch.setattr("gap_closed_clip.data.addresses.fetch", fetch)
    address = "https://example.org/x.ppm"
    pairs = load_checked_pairs(table(address, allow_urls=True), "train")
    assert asked == [(address, True)] and pairs["caption"] == ["one", "two"]
