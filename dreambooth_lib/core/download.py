"""Download a large file by an https link: whole, within a limit, and resumed where it broke off."""

import hashlib
import http.client
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qs, urlsplit

from dreambooth_lib.core.disk import explain_disk_errors, format_bytes, require_room
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import replace_file

SCHEMES = ("https",)  #: of links, and of what they redirect to
_TRIES = 4  # a connection that breaks is made again, and goes on where it was
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**20
#: What a link must not say in the open: it is written into configs and cards.
_SECRETS = ("token", "key", "api_key", "apikey", "access_token", "password")


class DownloadError(KitError, ValueError):
    """A link that cannot be downloaded; the message says why and what to do."""


class _Broken(Exception):
    """A connection that ended early."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to links of :data:`SCHEMES` only."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        check_link(newurl, secrets=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_link(url: str, secrets: bool = False) -> None:
    """Raise :class:`DownloadError` for a link that is not https or holds a password or a token.

    ``secrets`` are allowed in what a server redirects to, which is kept nowhere.
    """
    invalid = "the link to the base is not a valid URL; copy it again."
    try:
        parts = urlsplit(url)
        named = {name.lower() for name in parse_qs(parts.query)} & {*_SECRETS}
    except ValueError as error:
        raise DownloadError(invalid) from error
    if parts.scheme in SCHEMES and not parts.hostname:
        raise DownloadError(invalid)
    if parts.scheme not in SCHEMES:
        raise DownloadError(
            f"the link to {parts.hostname or 'the base'} is not https, so its file could be "
            "changed on the way; give an https link."
        )
    if not secrets and (named or parts.password or parts.username):
        raise DownloadError(
            f"the link to {parts.hostname} holds a token or a password, which would be written "
            "into the run's config; download the file yourself and give its path."
        )


def download(url: str, folder: Path, most: int, suffix: str) -> Path:
    """Download a link's file into ``folder`` and return its path there, which has this suffix.

    What has arrived stays there as ``NAME.part`` if the download breaks off, and the next call goes
    on from it, if the server says by its ETag that the file is still the same. Raises
    :class:`DownloadError` for a file of more than ``most`` bytes, and where it cannot be had.
    """
    check_link(url)
    place = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}{suffix}"
    part, tag = place.with_suffix(".part"), place.with_suffix(".etag")
    with explain_disk_errors(part):
        folder.mkdir(parents=True, exist_ok=True)
        for left in reversed(range(_TRIES)):
            try:
                _fetch(url, part, tag, most)
                break
            except (
                _Broken,
                URLError,
                http.client.HTTPException,
                TimeoutError,
                ConnectionError,
            ) as e:
                if left == 0 or isinstance(e, HTTPError):
                    raise _explained(url, e, part) from e
        part.replace(place)
        tag.unlink(missing_ok=True)
    return place


def _fetch(url: str, part: Path, tag: Path, most: int) -> None:
    """Get the rest of a file, or all of it, onto the end of ``part``."""
    from huggingface_hub.utils import tqdm

    have, headers = 0, {"User-Agent": "dreambooth_lib"}
    if part.exists() and tag.exists() and (have := part.stat().st_size):
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    request = urllib.request.Request(url, headers=headers)
    host = urlsplit(url).hostname
    with urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT) as answer:
        if answer.headers.get_content_type() in ("text/html", "application/json"):
            raise DownloadError(
                f"{host} answers with a page and not with a file; give the link of the file "
                "itself, or, if it needs a login, download it yourself and give its path."
            )
        have = have if answer.status == 206 else 0
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        if (total or 0) > most:
            raise _too_large(host, most)
        require_room(part.parent, (total or 0) - have)
        with suppress(FileNotFoundError):
            tag.unlink()
        if etag := answer.headers.get("ETag"):
            replace_file(tag, etag.encode())
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem[:8])
        with part.open("ab" if have else "wb") as file, bar:
            while data := answer.read(_CHUNK):
                have += len(data)
                if have > most:
                    raise _too_large(host, most)
                file.write(data)
                bar.update(len(data))
    if total is not None and have < total:
        raise _Broken(f"{format_bytes(have)} of {format_bytes(total)} arrived")


def _too_large(host: str | None, most: int) -> DownloadError:
    return DownloadError(
        f"the file on {host} is larger than {format_bytes(most)}, too large for a base in one "
        "file; check the link."
    )


def _explained(url: str, error: Exception, part: Path) -> DownloadError:
    host, status = urlsplit(url).hostname, error.code if isinstance(error, HTTPError) else 0
    what = {
        401: "it needs a login: download the file yourself and give its path",
        403: "it needs a login: download the file yourself and give its path",
        404: "it has no such file: check the link",
        416: "its file has changed: try again",
        429: "its rate limit was reached: wait a few minutes and try again",
    }.get(status, "check the network and try again; what has arrived is kept")
    if status == 416:
        part.unlink(missing_ok=True)
    reason = f"it answered {status}" if status else str(error) or type(error).__name__
    return DownloadError(f"the base could not be downloaded from {host} ({reason}); {what}.")
