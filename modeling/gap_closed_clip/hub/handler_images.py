"""
The images of a request to the endpoint: from base64 or a URL to an upright RGB picture, within limits.

`handler.py` imports it from the model folder, where the package is not installed. The conversion to RGB is that of the
code beside the weights.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import urljoin, urlsplit

from PIL import Image

from images_gap_closed_clip import to_rgb


URL_SWITCH = "GAP_CLOSED_CLIP_ALLOW_URLS"
MAX_IMAGE_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MAX_ASPECT = 20  # long side to short side: the short one is resized to the tower's, the long one follows
MAX_REDIRECTS = 3
FETCH_SECONDS = 10.0  # for a whole URL
# No more than these: Pillow runs Ghostscript for EPS, and rare decoders are where the holes are found.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "PPM")
# Addresses that carry an IPv4 address inside, which a gateway may send on to a private one: NAT64, 6to4, Teredo.
TRANSLATED = [ipaddress.ip_network(network) for network in ("64:ff9b::/96", "2002::/16", "2001::/32")]


class RequestError(Exception):
    """What is wrong with a request, for whoever sent it."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def read_image(value: Any, where: str, allow_urls: bool) -> Image.Image:
    """
    An upright RGB picture.

    Args:
        value: base64 of a file, a URL, a file's bytes or a PIL image; never a path.
        where: its place in the request, for messages.
        allow_urls: fetch what a URL leads to.

    Raises:
        RequestError: it is none of these, too large, damaged, or a URL that may not or can't be fetched.
    """
    if is_url(value) and not allow_urls:
        remedy = f"send the image itself as base64, or set {URL_SWITCH}=1 on the endpoint."
        raise RequestError(f"{where} is a URL, and this endpoint fetches none: {remedy}", 403)
    if isinstance(value, str):
        value = _fetch(value, where) if is_url(value) else _from_base64(value, where)
    return _picture(value, where)


def is_url(value: Any) -> bool:
    return isinstance(value, str) and value[:8].lower().startswith(("http://", "https://"))


def kind_of(value: Any) -> str:
    """What a value of a request is, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _from_base64(value: str, where: str) -> bytes:
    if len(value) > MAX_IMAGE_BYTES * 1.4 + 1000:  # base64 is 4/3 of the bytes, and has line breaks
        raise _too_large(where)
    header, comma, rest = value.partition(",")
    if comma and header.lower().startswith("data:") and header.lower().endswith(";base64"):
        value = rest
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            f"{where} is not base64: send the bytes of an image file as base64. Paths are never opened."
        ) from None


def _picture(value: Any, where: str) -> Image.Image:
    """An upright RGB picture of a file's bytes or a PIL image."""
    if isinstance(value, bytes | bytearray):
        picture = _open(bytes(value), where)
    elif isinstance(value, Image.Image):
        picture = value
    else:
        raise RequestError(f"{where} is {kind_of(value)}: send an image as base64.")
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise RequestError(f"{where} has {width} x {height} pixels: an image may have {MAX_PIXELS}.", 413)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"{where} has {width} x {height} pixels: one side may be {MAX_ASPECT} times the other.")
    try:
        return to_rgb(picture)
    except Exception:  # a damaged file makes Pillow raise a dozen different types
        raise RequestError(f"{where} is damaged or cut off: its pixels can't be read.") from None


def _open(data: bytes, where: str) -> Image.Image:
    if len(data) > MAX_IMAGE_BYTES:
        raise _too_large(where)
    if data[128:132] == b"DICM":
        raise RequestError(f"{where} is a DICOM file: send it windowed, as PNG or JPEG.")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(f"{where} has too many pixels: an image may have {MAX_PIXELS}.", 413) from None
    except Exception:
        raise RequestError(f"{where} is no image file of a known format: {', '.join(FORMATS)}.") from None


def _fetch(url: str, where: str) -> bytes:
    """An image from the internet: public addresses only, at every redirect, with limits on time and size."""
    for _ in range(MAX_REDIRECTS + 1):
        try:
            status, location, data = _get(url)
        except RequestError as error:
            raise RequestError(f"{where}: {error}", error.status) from None
        except Exception:  # sockets, TLS, HTTP and malformed URLs each have their own
            raise RequestError(f"{where}: the URL can't be fetched, or not within {FETCH_SECONDS:g} s.") from None
        if status not in (301, 302, 303, 307, 308) or not location:
            break
        url = urljoin(url, location)
    if status != 200:
        raise RequestError(f"{where}: the URL answers with status {status}.")
    return data


def _get(url: str) -> tuple[int, str | None, bytes]:
    """One request without redirects: status, Location, and at most MAX_IMAGE_BYTES + 1 of the body."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError("the URL is neither http nor https.", 403)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    addresses = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
    if not all(_is_public(address) for address in addresses):
        raise RequestError("the URL leads to an address that is not public.", 403)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(parts.hostname, port)
    # The address that was checked, not the name: that may lead elsewhere a moment later.
    address = min(addresses, key=lambda address: ":" in address)  # IPv4 where there is a choice
    connection.sock = socket.create_connection((address, port), timeout=FETCH_SECONDS)
    # That timeout is for one packet, and a server may send a byte at a time: this one is for all of them.
    line, deadline = connection.sock.dup(), time.monotonic() + FETCH_SECONDS
    timer = threading.Timer(FETCH_SECONDS, _hang_up, (line,))
    timer.daemon = True
    timer.start()
    try:
        if secure:
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*"})
        response = connection.getresponse()
        data = response.read(MAX_IMAGE_BYTES + 1)
        if time.monotonic() > deadline:  # without a Content-Length, a body that was cut off looks complete
            raise TimeoutError
        return response.status, response.getheader("Location"), data
    finally:
        timer.cancel()
        line.close()
        connection.close()


def _hang_up(line: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may just have ended by itself
        line.shutdown(socket.SHUT_RDWR)


def _is_public(address: str) -> bool:
    """Whether an IP address is on the internet, and not of this machine, its network or its cloud's metadata."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in TRANSLATED)


def _too_large(where: str) -> RequestError:
    return RequestError(f"{where} is too large: an image file may have {MAX_IMAGE_BYTES // 2**20} MiB.", 413)
