"""One self-contained HTML page out of a verdict and sections: style, script and pictures inside it.

Nothing is loaded from elsewhere, and the page's own policy forbids it. Content is there without
scripts; the script adds zooming, differences and the choice of theme.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

# Pictures up to this many pixels are embedded without loss; larger ones at a quality where the loss
# is far below what methods do.
LOSSLESS_PIXELS = 256 * 256
QUALITY = 92

# No request of any kind leaves the page; what stands in it may run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        html: its content, which must be safe: escape what isn't yours.
        lead: a sentence under the heading, as plain text.
        half: whether it takes half of a wide page; two such sections in a row stand side by side.
    """

    title: str
    html: str
    lead: str = ""
    half: bool = False

    @property
    def anchor(self) -> str:
        """Its name in the page's address."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"


def render(
    title: str,
    verdict: str,
    sections: Sequence[Section],
    kicker: str = "pared bench",
    subtitle: str = "",
) -> str:
    """A whole page.

    Args:
        title: what it is about.
        verdict: the result; its first sentence is set large.
        sections: in the order of the page.
        kicker: the line above the title.
        subtitle: a line of facts under the title, e.g. machine and date.

    Returns:
        HTML.
    """
    first, rest = first_sentence(verdict)
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(_section(section) for section in sections)
    small = f'<p class="more">{escape(rest)}</p>' if rest else ""
    facts = f'<p class="facts">{escape(subtitle)}</p>' if subtitle else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} - {escape(kicker)}</title>
<style>{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<div class="bar"><span class="kicker">{escape(kicker)}</span>
<button type="button" id="theme" class="needs-script">Theme: auto</button></div>
<h1>{escape(title)}</h1>{facts}
<p class="verdict">{escape(first)}</p>{small}
<nav aria-label="Sections">{links}</nav>
</header>
<main id="main">{body}</main>
<footer>Made by pared. One file: pictures, plots and figures are all inside.</footer>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    lead = f'<p class="lead">{escape(section.lead)}</p>' if section.lead else ""
    half = ' class="half"' if section.half else ""
    return (
        f'<section id="{section.anchor}"{half}><h2>{escape(section.title)}</h2>{lead}'
        f"{section.html}</section>"
    )


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence of a text, and the rest."""
    first, _, rest = re.sub(r"(?<=[.!?])\s+", "\n", text.strip()).partition("\n")
    return first, rest.replace("\n", " ")


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# Pictures -----------------------------------------------------------------------------------------


def picture(image: Any) -> str:
    """A picture as an address that holds its data.

    Args:
        image: a PIL picture, or an array (height, width, 3) of uint8 or in [0, 1].
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = Image.fromarray(_bytes(image))
    buffer = io.BytesIO()
    if image.width * image.height <= LOSSLESS_PIXELS:
        image.convert("RGB").save(buffer, "WEBP", lossless=True, method=6)
    else:
        image.convert("RGB").save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _bytes(image: Any) -> Any:
    import numpy as np

    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    return (image.clip(0, 1) * 255).round().astype(np.uint8)
