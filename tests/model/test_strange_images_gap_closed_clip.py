"""Images and addresses from strangers: what is refused, before it costs memory or reaches where it should not."""

import io
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import dicom_file, jpeg_of_scans
from PIL import EpsImagePlugin, Image

from gap_closed_clip.data import decode_image
from gap_closed_clip.model import fetch_gap_closed_clip
from gap_closed_clip.model.fetch_gap_closed_clip import fetch
from gap_closed_clip.model.images_gap_closed_clip import by_value, scale_to_8_bit
from gap_closed_clip.model.load_images_gap_closed_clip import load_image


def png(width: int, height: int, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(1, 4000), "1 x 4000 pixels, one side more than 50 times the other"),
        (png(8000, 7000, "1"), "8000 x 7000 pixels, more than 50,000,000: make it smaller first"),
        (png(20000, 20000, "1"), "too many pixels, more than 50,000,000"),
        (jpeg_of_scans(51), "51 scans, more than 50: save it anew as a JPEG"),
    ],
    ids=["thin", "large", "a bomb", "scans"],
)
def test_a_thin_or_large_image_is_refused_before_it_is_decoded(data, message):
    for read in (load_image, decode_image):
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            read(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


def test_also_as_an_array_a_pillow_image_and_dicom():
    thin = np.zeros((4000, 2), np.uint8)
    for image in (
        thin,
        thin[None],
        np.stack([thin] * 3, -1),
        Image.fromarray(thin),
        dicom_file(thin.astype(np.uint16)),
    ):
        with pytest.raises(ValueError, match="2 x 4000 pixels, one side more than 50 times the other"):
            load_image(image)


def test_an_image_without_a_pixel_is_named_so():
    with pytest.raises(ValueError, match="it has 0 x 0 pixels: none"):
        load_image(Image.new("L", (0, 0)))


def test_a_postscript_file_never_runs_ghostscript(tmp_path, monkeypatch):
    """Pillow knows it by its content, whatever it is called."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was run"))
    path = tmp_path / "scan.jpg"
    Image.new("RGB", (40, 40)).save(path, "EPS")
    for read in (load_image, decode_image):
        with pytest.raises(ValueError, match=r"scan\.jpg.*neither DICOM nor of a format that is read here"):
            read(str(path))


def test_values_of_16_bits_are_looked_up_and_come_out_the_same():
    rng = np.random.default_rng(0)
    for values in (
        rng.integers(0, 2**16, (300, 300), dtype=np.uint16),
        rng.integers(-(2**15), 2**15, (300, 300), dtype=np.int16),
    ):
        assert np.array_equal(scale_to_8_bit(values), scale_to_8_bit(values.astype(np.float64)))
        assert np.array_equal(
            by_value(lambda x: (x * 0.5 + 7).astype(np.int64), values), (values * 0.5 + 7).astype(np.int64)
        )


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image")
            return self.end_headers()
        self.send_response(404 if self.path == "/nowhere" else 200)
        self.end_headers()
        self.wfile.write(b"bytes of an image")
        if self.path == "/slow":
            for _ in range(40):
                time.sleep(0.05)
                self.wfile.write(b"x" * 70000)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_file_is_fetched_within_limits(server, monkeypatch):
    assert fetch(f"{server}/image") == fetch(f"{server}/moved") == b"bytes of an image"
    with pytest.raises(ValueError, match="/nowhere can't be fetched: the server answers 404"):
        fetch(f"{server}/nowhere")
    with pytest.raises(ValueError, match=r"/slow is not there after 0\.2 seconds"):
        fetch(f"{server}/slow", seconds=0.2)
    monkeypatch.setattr(fetch_gap_closed_clip, "MAX_FETCHED_BYTES", 2**20)
    with pytest.raises(ValueError, match="/slow gives more than 1 MiB"):
        fetch(f"{server}/slow")
    with pytest.raises(ValueError, match="file:///etc/passwd is no http or https URL"):
        fetch("file:///etc/passwd")


def test_of_a_strangers_address_only_public_ones(server, monkeypatch):
    name = server.replace("127.0.0.1", "localhost")
    for url in (f"{server}/image", f"{name}/image"):
        with pytest.raises(ValueError, match="no public address"):
            fetch(url, public_only=True)
    # What a redirection leads to is looked at as well: here the first address passes for a public one.
    asked = []
    connect = fetch_gap_closed_clip._connect_to_public

    def first_is_public(address, *args, **kwargs):
        asked.append(address)
        return (
            fetch_gap_closed_clip.socket.create_connection(address, *args, **kwargs)
            if len(asked) == 1
            else connect(address, *args, **kwargs)
        )

    monkeypatch.setattr(fetch_gap_closed_clip, "_connect_to_public", first_is_public)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1, no public address"):
        fetch(f"{server}/moved", public_only=True)
    assert len(asked) == 2
