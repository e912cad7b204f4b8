"""The HTTP session of the watches: it takes care that no object, however large or deep, is too much for the rest.

kopf reads lists page by page and watches line by line, as whole objects. Of jobs, it gets them from here without the rows
that nobody keeps, in pages that are bounded by their size, and decoded such that no object can hinder the others.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
from yarl import URL

from nemo_rl.job import decode, names
from nemo_rl_operator import observe

log = logging.getLogger(__name__)

FIRST_PAGE, LARGEST_PAGE = 10, 100
"""Jobs in the first page of a list, and at most; pages grow while they are small."""
PAGE_BYTES = 4 * 1024 * 1024
"""A page that is larger is asked for again with fewer jobs."""
PLAIN_BYTES = observe.ROWS_KEPT
"""A line of a watch that is not longer, and not deep, is passed on as it came."""


class CarefulSession:
    """Does what kopf asks of an aiohttp session. Lists and watches of jobs go through the care of this module."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._limit = FIRST_PAGE

    @property
    def headers(self) -> Any:
        return self._session.headers

    @property
    def closed(self) -> bool:
        return self._session.closed

    async def close(self) -> None:
        await self._session.close()

    async def request(self, method: str, url: str, **options: Any) -> aiohttp.ClientResponse:
        target = URL(url)
        if method.lower() != "get" or target.name != names.PLURAL:
            return await self._session.request(method, url, **options)
        if target.query.get("watch") == "true":
            response = await self._session.request(method, url, **options)
            if response.status == 200:
                response.content = _Lines(response.content)  # type: ignore[assignment]
            return response
        return await self._page(target, options)

    async def _page(self, url: URL, options: dict[str, Any]) -> aiohttp.ClientResponse:
        """A page that is not larger than PAGE_BYTES, unless a single job is."""
        while True:
            limit = self._limit
            response = await self._session.request("GET", str(url.update_query(limit=str(limit))), **options)
            if response.status != 200:
                return response
            text = await _read(response, PAGE_BYTES if limit > 1 else None)
            if text is None:
                response.close()
                self._limit = max(1, limit // 4)
                continue
            if len(text) < PAGE_BYTES // 4:
                self._limit = min(LARGEST_PAGE, 2 * limit)
            page = decode.loads(text)
            del text
            if isinstance(page, dict):
                page["items"] = [light(item) for item in page.get("items") or ()]
            response.json = _Answer(page)  # type: ignore[method-assign]
            return response


class _Answer:
    """Gives what was read, once, so that it is not kept for as long as the response is."""

    def __init__(self, value: Any) -> None:
        self._value = value

    async def __call__(self, **_: Any) -> Any:
        value, self._value = self._value, None
        return value


async def _read(response: aiohttp.ClientResponse, limit: int | None) -> bytes | None:
    """The body; None as soon as it is longer than the limit."""
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if limit is not None and size > limit:
            return None
    return b"".join(parts)


class _Lines:
    """The content of a watch, each line with a light object in it."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        parts: list[bytes] = []
        async for data in self._content.iter_any():
            first, *rest = data.split(b"\n")
            parts.append(first)
            for start in rest:
                yield line(b"".join(parts)) + b"\n"
                parts = [start]


def line(text: bytes) -> bytes:
    """An event of a watch, with its object made light where it is not; nothing where it cannot be read at all."""
    if len(text) <= PLAIN_BYTES and not decode.deeper(text, decode.KEPT_DEPTH):
        return text
    try:
        event = decode.loads(text)
    except ValueError as error:
        log.error("an event of the watch is no JSON and is passed over: %s", error)
        return b""
    if isinstance(event, dict) and isinstance(event.get("object"), dict):
        event["object"] = light(event["object"])
    return json.dumps(event, separators=(",", ":")).encode()


def light(raw: Any) -> Any:
    """The object without what nobody reads, with a digest in place of rows that take too much memory."""
    meta = raw.get("metadata") if isinstance(raw, dict) else None
    if not isinstance(meta, Mapping):
        return raw
    found = {**raw, "metadata": {name: value for name, value in meta.items() if name != "managedFields"}}
    if isinstance(raw.get("spec"), dict):
        found["spec"] = observe.abridged(raw["spec"])
    return found
