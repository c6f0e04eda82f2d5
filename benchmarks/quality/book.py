"""A public text: prose of The Debian Administrator's Handbook (R. Hertzog, R. Mas; GPL-2+ or CC-BY-SA-3.0)."""

import hashlib
import io
import lzma
import os
import tarfile
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

URL = "http://deb.debian.org/debian/pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb"
SHA256 = "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"
NAME = "Debian Administrator's Handbook (debian-handbook 11.20220922)"
_FOLDER = "./usr/share/doc/debian-handbook/html/en-US/"
_LEAST = 200  # characters of a paragraph: headings and captions are left out


def handbook(deb: Path | None = None) -> str:
    """Its paragraphs, one a line, in the order of the file names. The package is fetched once, and checked."""
    if deb is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "assay"
        deb = cache / URL.rpartition("/")[2]
        if not deb.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(URL, timeout=60) as reply:
                data = reply.read()
            _check(data, URL)
            deb.write_bytes(data)
    data = deb.read_bytes()
    _check(data, str(deb))
    lines: list[str] = []
    with tarfile.open(fileobj=io.BytesIO(_member(data, "data.tar"))) as tar:
        pages = sorted(m.name for m in tar if m.name.startswith(_FOLDER) and m.name.endswith(".html"))
        for name in pages:
            page = tar.extractfile(name)
            assert page is not None
            parser = _Paragraphs()
            parser.feed(page.read().decode())
            lines += parser.found
    return "\n".join(lines) + "\n"


def _check(data: bytes, where: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != SHA256:
        raise SystemExit(f"{where}: expected SHA-256 {SHA256}, got {got}")


def _member(deb: bytes, prefix: str) -> bytes:
    """A file of an ar archive, decompressed where it is xz."""
    at = 8  # "!<arch>\n"
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip(), int(deb[at + 48 : at + 58])
        data = deb[at + 60 : at + 60 + size]
        if name.startswith(prefix):
            return lzma.decompress(data) if name.rstrip("/").endswith(".xz") else data
        at += 60 + size + size % 2
    raise SystemExit(f"expected a member {prefix} in the Debian package")


class _Paragraphs(HTMLParser):
    """Texts of <p> and <div class="para">, white space folded; listings and tables left out."""

    _SKIPPED = ("pre", "script", "style", "table", "nav")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._text: list[str] | None = None
        self._skip = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag in self._SKIPPED
        if tag == "p" or (tag == "div" and ("class", "para") in attrs):
            self._end()
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag in self._SKIPPED
        if tag in ("p", "div"):
            self._end()

    def handle_data(self, data: str) -> None:
        if self._text is not None and not self._skip:
            self._text.append(data)

    def _end(self) -> None:
        text = " ".join("".join(self._text or []).split())
        if len(text) >= _LEAST:
            self.found.append(text)
        self._text = None
