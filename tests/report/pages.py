"""What every page that Horizon writes has to be."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "source"}


class Elements(HTMLParser):
    """Every start tag with its attributes, text by element, and whether all elements are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> in {self.open}"

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))


def charts(page):
    return re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)


def check_page(page):
    """It is well-formed, asks for nothing from elsewhere, runs nothing, and suits screens and paper."""
    elements = Elements(page)
    assert elements.open == []
    for tag, attributes in elements.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    queries = re.findall(r"@media ([^{]*prefers-color-scheme[^{]*) \{", page)
    assert set(queries) == {"screen and (prefers-color-scheme: dark)"}  # others that look right are never true
    assert "@media print" in page and 'name="viewport"' in page
    colors = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert colors <= set(re.findall(r"(--[\w-]+):", page))
    for chart in charts(page):
        assert not re.search(r"https?://|#0000[0-9a-f]{2}", chart)
        assert "var(--text)" in chart
    return elements
