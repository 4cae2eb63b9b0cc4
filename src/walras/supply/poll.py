"""A GET of an engine's metrics, within a time and a size, on the running loop."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from urllib.parse import urlsplit

import httptools

from walras.errors import RecordError, SettingsError

MOST = 16 * 1024 * 1024
"""Largest page, bytes: the largest known are of a megabyte."""
ACCEPT = "text/plain;version=0.0.4"


def whole_url(url: str, path: str, key: str) -> str:
    """The address with a path, the engine's own where it has none.

    Raises:
        SettingsError: not an address of HTTP.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        sound = None
    if not sound or not url.isprintable() or " " in url:
        raise SettingsError(f"'{url}' is no address", key=key, hint="for example http://127.0.0.1:8000")
    return url if parts.path.strip("/") else url.rstrip("/") + path


async def fetch(url: str, timeout_s: float) -> tuple[bytes, str]:
    """Body and content type of what a GET answers.

    Raises:
        RecordError: nobody there, no answer in time, an error, not HTTP, or too much; says which.
    """
    try:
        async with asyncio.timeout(timeout_s):
            got = await _get(url)
    except TimeoutError as error:
        raise RecordError(f"gives no whole answer within {timeout_s:g} s") from error
    except ConnectionError as error:
        raise RecordError(f"cannot be reached: {os.strerror(error.errno or 0)}") from error
    except OSError as error:
        raise RecordError(f"cannot be reached: {error.strerror or error}") from error
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        raise RecordError("does not speak HTTP") from error
    if got.status != 200:
        to = f"; it is at {got.headers['location']}" if "location" in got.headers else ""
        raise RecordError(f"answers {got.status}{to}", hint=url)
    return bytes(got.body), got.headers.get("content-type", "")


async def _get(url: str) -> _Got:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure or None)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = (f"GET {path} HTTP/1.1", f"host: {parts.netloc}", f"accept: {ACCEPT}", "connection: close")
        writer.write("\r\n".join((*lines, "", "")).encode())
        got = _Got()
        while not got.whole:
            got.take(await reader.read(65_536))
        return got
    finally:
        writer.transport.abort()  # a close that is polite may take as long as the other side likes


class _Got:
    """An answer as it comes."""

    def __init__(self) -> None:
        self.status, self.headers, self.body, self.whole = 0, dict[str, str](), bytearray(), False
        self._bytes = 0
        self._parser: Any = httptools.HttpResponseParser(self)

    def take(self, data: bytes) -> None:
        if data:
            self._parser.feed_data(data)
        elif self.status and not self.headers.keys() & {"content-length", "transfer-encoding"}:
            self.whole = True  # the end of the connection is the end of the body
        else:
            raise RecordError("ends in the middle of an answer")
        self._bytes += len(data)
        if self._bytes > MOST:
            raise RecordError(f"answers more than {MOST // 1024**2} MiB")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.whole = True
