"""Addresses of object stores: which texts are one, and what is wrong with one that cannot work. Loads nothing."""

from __future__ import annotations

import re

STORES = {"s3": "Amazon S3 or a server of its kind", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
"""Schemes of stores that are read and written, with what each names."""
READABLE = (*STORES, "https", "http")
"""Schemes that models and data are read from."""
_ALIASES = {"gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az", "s3a": "s3", "s3n": "s3"}
_URI = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,251}[A-Za-z0-9]")
MAX_LENGTH = 900


def is_store(text: object) -> bool:
    """Whether a text is the address of an object store that can be written."""
    return isinstance(text, str) and text.partition("://")[0] in STORES and "://" in text


def is_readable(text: object) -> bool:
    """Whether a text is an address that models and data are read from: an object store or a web server."""
    return isinstance(text, str) and text.partition("://")[0] in READABLE and "://" in text


def problem(text: str, schemes: tuple[str, ...] = tuple(STORES)) -> str | None:
    """What is wrong with an address, in words with the cure; None for a good one."""
    known = ", ".join(f"{scheme}://" for scheme in schemes)
    match = _URI.fullmatch(text)
    if match is None:
        return f"found {text!r}; expected an address such as s3://bucket/folder (known: {known})"
    scheme, rest = match.groups()
    if scheme not in schemes:
        if (meant := _ALIASES.get(scheme)) in schemes:
            return f"found the scheme {scheme}://; write {meant}:// for {STORES[str(meant)]}"
        if (on_hub := re.match(r"(?:datasets/)?([\w.-]+/[\w.-]+)", rest.partition("huggingface.co/")[2])) is not None:
            return f"found the page of the hub {text!r}; write the name alone: {on_hub[1]}"
        return f"found the scheme {scheme}://; expected one of {known}"
    bucket, _, path = rest.partition("/")
    if "@" in bucket:
        return (
            "the address holds credentials, which everybody who may read the job would see; leave them out, and give them by "
            "environment variables, a Secret (envFrom) or the service account"
        )
    if any(character in text for character in "?#"):
        return f"found {text!r}, which ends in a query or a fragment; expected an address without '?' and '#'"
    if scheme in STORES and not _BUCKET.fullmatch(bucket):
        return f"found the bucket {bucket!r}; expected a name of three letters or more, as in {scheme}://bucket/folder"
    if not bucket:
        return f"found {text!r}, which names no server"
    if len(text) > MAX_LENGTH:
        return f"the address has {len(text)} characters; at most {MAX_LENGTH} are allowed"
    parts = path.rstrip("/").split("/") if path else []
    if any(part in ("", ".", "..") for part in parts) or not text.isprintable() or "\\" in text:
        return f"found {text!r}; expected plain folder names between single slashes"
    return None


def joined(uri: str, *parts: str) -> str:
    """The address of what lies below another one."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])
