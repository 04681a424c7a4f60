"""Terms of use as text to show: the article of a saved web page, without its decoration."""

from __future__ import annotations

import re
from html.parser import HTMLParser

TERMS_FILE = "TERMS.txt"

_BLOCKS = frozenset({"p", "li", "h1", "h2", "h3", "h4", "br", "div", "ol", "ul", "tr"})
_UNSEEN = frozenset({"script", "style", "template", "devsite-feedback", "button"})


def text_of_html(html: str) -> str:
    """The text inside <article>, or all text when there is none; one paragraph a line."""
    reader = _Reader()
    reader.feed(html)
    text = "".join(reader.article or reader.everything)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line) + "\n"


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.everything: list[str] = []
        self.article: list[str] = []
        self._articles = 0
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self._articles += tag == "article"
        self._unseen += tag in _UNSEEN
        if tag in _BLOCKS:
            self._add("\n")

    def handle_endtag(self, tag: str) -> None:
        self._articles -= tag == "article"
        self._unseen -= tag in _UNSEEN
        if tag in _BLOCKS:
            self._add("\n")

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._add(re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        self.everything.append(text)
        if self._articles:
            self.article.append(text)
