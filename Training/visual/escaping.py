"""Escapes text that others wrote, such as names of files, classes and models, for the format that it is written in.

A recipe, a class list or a picture can come from anywhere. Each function makes a name safe for one format: it stays
one line, it is not taken for markup or for a formula, and it cannot move the cursor of a terminal.
"""

import functools

from Training.errors import escape

# HTML entities work in GitHub's Markdown and in TensorBoard's, which knows fewer escapes with a backslash.
MARKUP = {character: f"&#{ord(character)};" for character in "\\`*[]|~"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # a spreadsheet evaluates cells that start with these
LONGEST_CELL = 80  # characters in a table for people to read


def shorten_name(name, most):
    """Return a name of at most `most` characters, the middle replaced by an ellipsis."""
    if len(name) <= most:
        return name
    start = most // 2
    return f"{name[:start]}…{name[len(name) - (most - start - 1) :]}"


def escape_console(text):
    """Return a text as one line for a terminal: escape sequences and line breaks are printed as Python escapes."""
    return escape(str(text))


def escape_markdown(text):
    """Return a text as the content of one cell of a Markdown table: no markup, no HTML, no cell or row of its own."""
    return "".join(MARKUP.get(character, character) for character in escape(str(text)))


def make_markdown_table(header, rows):
    """Return a Markdown table of values; every cell is escaped, and a long one is shortened."""
    cells = [[escape_markdown(shorten_name(str(value), LONGEST_CELL)) for value in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def escape_csv(text):
    """Return a text as one cell of a CSV file that no spreadsheet takes for a formula.

    A text that a spreadsheet would evaluate gets a leading apostrophe, as OWASP recommends; numbers, and a lone dash
    for a missing value, stay as they are.
    """
    line = escape(str(text))
    if line.lstrip().startswith(FORMULA_STARTS) and line != "-" and not _is_number(line):
        return f"'{line}"
    return line


def escape_figure(text, most=60):
    """Return a text for matplotlib: one line of at most `most` characters, no formula, only characters of the font."""
    line = "".join(c if c in _font_characters() else ascii(c)[1:-1] for c in escape(str(text)))
    return shorten_name(line, most).replace("$", r"\$")


def is_drawable(text):
    """Return whether matplotlib's font has every character of a text."""
    return text.isprintable() and set(text) <= _font_characters()


@functools.cache
def _font_characters():
    from matplotlib import font_manager

    return frozenset(map(chr, font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()))


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
