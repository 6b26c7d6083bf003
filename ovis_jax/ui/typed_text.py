"""Showing a visitor's text in the chat exactly as it was typed."""

import re

MARKUP = re.compile(
    r"[\\`*_{}\[\]<>#+|~$&@^=]"  # Markdown, HTML, LaTeX and e-mail addresses
    r"|[^\S ]"  # line breaks and tabs, which could begin a block
    r"|(?<!\w)-"  # a list or a rule
    r"|(?<=\d)[.)]"  # a numbered list
    r"|(?<=[wW])\.|:(?=/)"  # links
)
"""What the chat's Markdown could interpret in a text without surrounding spaces."""


def escape_markup(text: str) -> str:
    """Replace everything that Markdown, HTML or LaTeX could interpret by character references.

    The chat shows the references as the characters. `assets/page/page.js` decodes them for editing.
    """
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", text)
