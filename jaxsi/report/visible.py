"""Texts of models in a page: control characters become visible, and nothing in a text is markup or code."""

import json
import re
from typing import Any

from markupsafe import Markup, escape

# What a reader cannot see, or what changes how the rest is shown: controls except for tab and newline, zero-width and
# bidirectional characters, line and paragraph separators, the byte order mark, halves of surrogate pairs, tags.
HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U000e0000-\U000e0fff"
)
_HIDDEN = re.compile(f"[{HIDDEN}]")
_UNSAFE_IN_SCRIPT = re.compile(f"[<>&{HIDDEN}]")


def code_point(character: str) -> str:
    """ "U+202E" for a character."""
    return f"U+{ord(character):04X}"


def plain(text: Any) -> str:
    """A text for a place that takes no markup, such as a terminal or a table: "U+001B" in place of an escape."""
    return _HIDDEN.sub(lambda found: f"[{code_point(found[0])}]", str(text))


def shown(text: Any) -> Markup:
    """A text as HTML: markup in it is text, and a hidden character is a small box with its code point."""
    parts, last = [], 0
    text = str(text)
    for found in _HIDDEN.finditer(text):
        parts += [
            escape(text[last : found.start()]),
            Markup('<span class="hidden-char">{}</span>').format(code_point(found[0])),
        ]
        last = found.end()
    return Markup("").join([*parts, escape(text[last:])])


def json_for_script(value: Any) -> Markup:
    """A JSON value for a <script> of data: no text in it can end the script, and it is valid UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def escaped(found: re.Match[str]) -> str:
        units = found[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{int.from_bytes(units[i : i + 2]):04x}" for i in range(0, len(units), 2))

    return Markup(_UNSAFE_IN_SCRIPT.sub(escaped, text))
