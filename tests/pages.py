"""A page of HTML as a reader of it sees it."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.tags, self.pieces = html, [], []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", "".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)
