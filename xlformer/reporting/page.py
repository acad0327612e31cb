"""The page of a report: HTML that stands alone, in one file, and runs nothing.

Every text becomes HTML in `Html.of` or `element` and nowhere else: what is not Html by
type is escaped. A policy in the page's head forbids whatever it does not contain
itself, so that even a fault here could load nothing and run nothing.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

from xlformer.reporting import style

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# What the text of a run may hold that a page must not: other control characters are no
# part of HTML, and some turn the direction of all that follows them.
_SPOILING = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xFFFE, 0xFFFF], "\ufffd"
)
_SPOILING |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_SPOILING |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
LONGEST_CELL = 200  # characters


def clean(text: Any) -> str:
    """A text on one line without characters that no page can hold."""
    return " ".join(str(text).translate(_SPOILING).split())


class Html(str):
    """A text that is HTML already; made of others by `of`, `element` and `joined`."""

    @classmethod
    def of(cls, text: Any) -> Html:
        """Any text, escaped; Html as it is."""
        if isinstance(text, cls):
            return text
        return cls(html.escape(str(text).translate(_SPOILING)))


def joined(parts: Sequence, between: str = "") -> Html:
    """Parts one after another."""
    return Html(Html.of(between).join(Html.of(part) for part in parts))


def element(name: str, *content, **attributes) -> Html:
    """<name ...>content</name>; `class_` is class, and `_` in a name is `-`."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{Html.of(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>{joined(content)}</{name}>")


# What a section is made of ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; `kind` 'missing' says what a run does not have, 'warning' warns."""

    text: Any
    kind: str = ""

    def html(self) -> Html:
        return element("p", self.text, class_=self.kind or None)


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading inside of a section."""

    text: Any

    def html(self) -> Html:
        return element("h3", self.text)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table that scrolls in its own box; the first column names the rows."""

    caption: str
    columns: Sequence
    rows: Sequence[Sequence]

    def html(self) -> Html:
        # Numbers end at one place where a column has nothing else.
        columns = list(zip(*self.rows, strict=True))[1:]
        kinds = ["number" if all(map(_is_number, c)) else None for c in columns]
        head = [
            element("th", cell, scope="col", class_=kind)
            for cell, kind in zip(self.columns, [None, *kinds], strict=True)
        ]
        body = []
        for first, *others in self.rows:
            cells = [
                element("td", *_shown(x), class_=kind)
                for x, kind in zip(others, kinds, strict=True)
            ]
            body.append(element("tr", element("th", first, scope="row"), *cells))
        table = element(
            "table",
            element("thead", element("tr", *head)),
            element("tbody", *body),
        )
        # It can be scrolled by the keyboard too.
        options = {"role": "region", "tabindex": 0, "aria_label": self.caption}
        above = element("p", self.caption, class_="caption")
        return joined([above, element("div", table, class_="wide", **options)])


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels beside each other as far as there is room, and below each other.

    panels: of charts.Panel, drawn: inline SVG.
    """

    caption: Any
    panels: Sequence[Html]

    def html(self) -> Html:
        panels = element("div", *self.panels, class_="panels")
        return element("figure", panels, element("figcaption", self.caption))


@dataclasses.dataclass(frozen=True)
class Folded:
    """Blocks that are shown when they are asked for."""

    title: str
    blocks: Sequence

    def html(self) -> Html:
        inside = [block.html() for block in self.blocks]
        return element("details", element("summary", self.title), *inside)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text that was generated, after the text that it goes on from."""

    title: str
    prompt: str
    text: str

    def html(self) -> Html:
        words = element("pre", element("b", self.prompt), self.text, tabindex=0)
        return element("div", element("h4", self.title), words, class_="sample")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `name` is its anchor."""

    name: str
    title: str
    blocks: Sequence

    def html(self) -> Html:
        blocks = [block.html() for block in self.blocks]
        heading = element("h2", self.title, id=f"{self.name}-title")
        options = {"id": self.name, "aria_labelledby": f"{self.name}-title"}
        return element("section", heading, *blocks, **options)


def page(title: str, subtitle: Any, sections: Sequence[Section], about: Any) -> str:
    """The whole file; `about` says how it was made."""
    links = [element("li", element("a", s.title, href=f"#{s.name}")) for s in sections]
    contents = element("nav", element("ol", *links), aria_label="Contents")
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
            Html('<meta name="viewport" content="width=device-width">'),
            Html('<meta name="color-scheme" content="light dark">'),
            # Else a browser would look for an icon, and say that there is none.
            Html('<link rel="icon" href="data:,">'),
            element("title", title),
            Html(f"<style>\n{style.CSS}</style>"),
        ],
        "\n",
    )
    header = element("header", element("h1", title), element("p", subtitle))
    body = joined([s.html() for s in sections], "\n")
    main = element("main", header, "\n", body, "\n", element("footer", about))
    whole = element("body", contents, "\n", main)
    head = element("head", "\n", head, "\n")
    return f"<!doctype html>\n{element('html', head, whole, lang='en')}\n"


# Cells --------------------------------------------------------------------------------


def _is_number(value) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain or value is None


def _shown(value) -> list:
    """A number as people read it, a text as it is; what is too long is cut."""
    if isinstance(value, Html):
        return [value]
    text = shown(value)
    # A stranger's config may hold a megabyte in one field.
    return [text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"]


def shown(value) -> str:
    """A value as a cell shows it: 1,234,567, 1.234, yes, – where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1 << 63 else "too large"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        if value and not 1e-3 <= abs(value) < 1e5:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 or not value else f"{value:#.4g}"
    return str(value)
