"""Fetches a file by its URL: for so long, of so many bytes, and, where asked, from public addresses alone."""

import http.client
import ipaddress
import socket
import time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPHandler, HTTPSHandler, ProxyHandler, Request, build_opener


FETCH_SECONDS = 30.0  # for the whole of a file
MAX_FETCHED_BYTES = 200 * 2**20
_PIECE = 2**16


def fetch(url: str, public_only: bool = False, seconds: float = FETCH_SECONDS) -> bytes:
    """
    The bytes that a `http` or `https` URL gives.

    Args:
        public_only: refuse addresses of this machine and of its own network, redirections to them included, and use no
            proxy, behind which addresses can't be known: for URLs that come from somebody else.
        seconds: after which the download is given up.

    Raises:
        ValueError: another kind of URL, an address that is not public, a server that refuses or is too slow, a file of
            more than `MAX_FETCHED_BYTES`.
    """
    if not url[:8].lower().startswith(("http://", "https://")):
        raise ValueError(f"{url:.200} is no http or https URL.")
    handlers: list[Any] = [_HTTP(public_only), _HTTPS(public_only)] + ([ProxyHandler({})] if public_only else [])
    request = Request(url, headers={"User-Agent": "gap_closed_clip"})  # some servers refuse urllib's own name
    end = time.monotonic() + seconds
    try:
        with build_opener(*handlers).open(request, timeout=seconds) as response:
            data = bytearray()
            while piece := response.read1(_PIECE):
                data += piece
                if len(data) > MAX_FETCHED_BYTES:
                    raise ValueError(f"{url:.200} gives more than {MAX_FETCHED_BYTES // 2**20} MiB.")
                if time.monotonic() > end:
                    raise TimeoutError
    except TimeoutError as error:
        raise ValueError(f"{url:.200} is not there after {seconds:g} seconds.") from error
    except HTTPError as error:
        raise ValueError(f"{url:.200} can't be fetched: the server answers {error.code}.") from error
    except (URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise ValueError(f"{url:.200} is not there after {seconds:g} seconds.") from error
        raise ValueError(f"{url:.200} can't be fetched: {reason}.") from error
    return bytes(data)


def _connect_to_public(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
    """`socket.create_connection`, which closes a connection to an address that is not public before it is used."""
    connection = socket.create_connection(address, *args, **kwargs)
    peer = ipaddress.ip_address(connection.getpeername()[0].partition("%")[0])
    if not (getattr(peer, "ipv4_mapped", None) or peer).is_global:
        connection.close()
        raise OSError(f"{address[0]} is {peer}, no public address")
    return connection


class _HTTP(HTTPHandler):
    def __init__(self, public_only: bool):
        super().__init__()
        self.public_only = public_only

    def http_open(self, request):
        return self.do_open(lambda *args, **kwargs: _limited(http.client.HTTPConnection, self, args, kwargs), request)


class _HTTPS(HTTPSHandler):
    def __init__(self, public_only: bool):
        super().__init__()
        self.public_only = public_only

    def https_open(self, request):
        return self.do_open(
            lambda *args, **kwargs: _limited(http.client.HTTPSConnection, self, args, kwargs),
            request,
            context=self._context,
        )


def _limited(kind: type, handler: "_HTTP | _HTTPS", args: tuple, kwargs: dict) -> http.client.HTTPConnection:
    connection = kind(*args, **kwargs)
    if handler.public_only:
        connection._create_connection = _connect_to_public
    return connection


__all__ = ["FETCH_SECONDS", "MAX_FETCHED_BYTES", "fetch"]
