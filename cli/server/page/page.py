"""The page at `/`: one self-contained file, and the headers that let it load nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path


@functools.cache
def page_text() -> str:
    """Return the page."""
    return Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    """Return the hash of the page's one element `tag`, as a content security policy names it."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}
