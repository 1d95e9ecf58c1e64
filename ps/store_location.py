"""Locations in object stores: `s3://…` and `gs://…` URIs, read and connected to.

Only what a location means; `ps.storage` has the files. URIs are read here rather than by Arrow's
`from_uri` because that knows neither time limits nor retries, whose defaults let a process wait for
minutes (S3) or a quarter of an hour (GCS) on a server that is gone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs

from ps.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_SCHEMES = "s3://, gs://, gcs:// or file://"


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise ValueError(text)
    return value


_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "s3": {
        "region": str,
        "endpoint_override": str,
        "scheme": str,
        "anonymous": _flag,
        "role_arn": str,
        "allow_bucket_creation": _flag,
        "force_virtual_addressing": _flag,
        "tls_ca_file_path": str,
        "connect_timeout": _seconds,
        "request_timeout": _seconds,
        "max_attempts": _count,
    },
    "gs": {
        "endpoint_override": str,
        "scheme": str,
        "project_id": str,
        "retry_limit_seconds": _seconds,
    },
}
"""What may stand behind the `?` of a location. Most are Arrow's; times are in seconds."""
_S3_DEFAULTS = {"connect_timeout": 5.0, "request_timeout": 10.0, "max_attempts": 3}
"""A server that has stopped answering is given up after at most 50 s."""
_GS_RETRY_LIMIT_S = 60.0


def is_uri(location: str) -> bool:
    """Whether it starts with a scheme. A folder `x:` of the working folder is `./x:/`."""
    return _SCHEME.match(location) is not None


def local_path(uri: str) -> str | None:
    """The path of a `file:` URI, None for other schemes.

    >>> local_path("file:///data/a%20b"), local_path("s3://bucket/x")
    ('/data/a b', None)
    """
    parts = urlsplit(uri)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise ConfigError(f"location '{without_credentials(uri)}': expected file:///folder")
    return unquote(parts.path)


def without_credentials(uri: str) -> str:
    """A URI for messages. Drops too much rather than too little of one that is malformed.

    >>> without_credentials("s3://key:secret@bucket/x?region=a")
    's3://bucket/x?region=a'
    """
    return re.sub(r"//.*@", "//", uri, count=1, flags=re.DOTALL)


@dataclass(frozen=True, slots=True)
class StoreLocation:
    """A folder in an object store."""

    scheme: str
    """`s3` or `gs`."""
    folder: str
    """The bucket and the path in it."""
    options: Mapping[str, str]
    user: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Read a URI.

        Raises:
            ConfigError: unknown scheme or option, no bucket.
        """
        where = f"location '{without_credentials(uri)}'"
        try:
            parts = urlsplit(uri)
            pairs = parse_qsl(parts.query, strict_parsing=True) if parts.query else []
            options = dict(pairs)
        except ValueError:  # Python's message may quote what must not be printed
            raise ConfigError(f"{where}: expected options as ?name=value&name=value") from None
        scheme = {"gcs": "gs"}.get(parts.scheme, parts.scheme)
        if scheme not in _OPTIONS or not uri[len(parts.scheme) :].startswith("://"):
            raise ConfigError(f"{where}: it must be a folder or start with {_SCHEMES}")
        login, _, bucket = parts.netloc.rpartition("@")
        if not bucket or ":" in bucket or parts.fragment:
            raise ConfigError(
                f"{where}: expected {scheme}://bucket/folder?option=value "
                "(in credentials, '/', '+' and '@' must be percent-quoted)"
            )
        _check_options(where, scheme, options)
        user, _, secret = login.partition(":")
        if scheme == "gs" and login not in ("", "anonymous"):
            raise ConfigError(f"{where}: of credentials, gs:// takes only 'anonymous@'")
        if scheme == "s3" and bool(user) != bool(secret):
            raise ConfigError(f"{where}: credentials are written key:secret@")
        names = [unquote(bucket), *filter(None, unquote(parts.path).split("/"))]
        return cls(scheme, "/".join(names), options, unquote(user) or None, unquote(secret) or None)

    @property
    def location(self) -> str:
        """As a URI without credentials."""
        query = f"?{urlencode(self.options, safe='/:')}" if self.options else ""
        return f"{self.scheme}://{quote(self.folder)}{query}"

    @property
    def uri(self) -> str:
        """As a URI with credentials, if there are any."""
        login = ":".join(quote(part, safe="") for part in (self.user, self.secret) if part)
        start = f"{self.scheme}://"
        return start + (f"{login}@" if login else "") + self.location.removeprefix(start)

    def below(self, folder: str) -> StoreLocation:
        """A folder of this one."""
        return replace(self, folder=self.key(folder))

    def key(self, path: str) -> str:
        """Arrow's path of a file: the bucket and the object's key."""
        return self.folder if path in ("", ".") else f"{self.folder}/{path}"

    def name(self, path: str) -> str:
        """A file's URI for messages, without credentials and options."""
        return f"{self.scheme}://{self.key(path)}"

    def connect(self) -> fs.FileSystem:
        """The file system; asks S3 for the bucket's region if nothing says it.

        Raises:
            OSError: S3 does not know the bucket, or cannot be reached.
            ConfigError: this pyarrow is built without the store.
        """
        values = {name: _OPTIONS[self.scheme][name](text) for name, text in self.options.items()}
        try:
            return self._s3(values) if self.scheme == "s3" else self._gcs(values)
        except (ImportError, pa.ArrowInvalid) as e:
            reason = " ".join(str(e).split())
            raise ConfigError(f"location '{self.location}': {reason}") from e

    def _s3(self, values: dict[str, Any]) -> fs.FileSystem:
        values = _S3_DEFAULTS | values
        if "region" not in values:
            # Where there is no AWS there are no regions, but requests are signed with one.
            aws = "endpoint_override" not in values
            bucket = self.folder.partition("/")[0]
            values["region"] = (
                fs.resolve_s3_region(bucket)
                if aws
                else os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
            )
        return fs.S3FileSystem(
            access_key=self.user,
            secret_key=self.secret,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=values.pop("max_attempts")),
            allow_delayed_open=True,  # small files in one PUT
            **values,
        )

    def _gcs(self, values: dict[str, Any]) -> fs.FileSystem:
        limit = values.pop("retry_limit_seconds", _GS_RETRY_LIMIT_S)
        return fs.GcsFileSystem(
            anonymous=self.user is not None, retry_time_limit=timedelta(seconds=limit), **values
        )


def _check_options(where: str, scheme: str, options: Mapping[str, str]) -> None:
    known = _OPTIONS[scheme]
    for name, text in options.items():
        if name not in known:
            raise ConfigError(
                f"{where}: no option '{name}' for {scheme}://; there are {', '.join(known)}"
            )
        try:
            known[name](text)
        except (KeyError, ValueError):
            raise ConfigError(f"{where}: option '{name}' cannot be {text!r:.80}") from None
