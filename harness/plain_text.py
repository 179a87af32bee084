"""Text from elsewhere for a terminal: what would move the cursor, colour or turn the line around is shown instead."""

import unicodedata

import typer

# Controls, and what changes the direction of the text around it; line breaks and tabs are themselves.
_KEPT = "\n\t"
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def unprintable(text: str) -> str | None:
    """The first such character, written out; None where there is none."""
    found = next((char for char in text if _is_unprintable(char)), None)
    return None if found is None else _written(found)


def printable(text: str) -> str:
    """The text with each such character written out: `\\x1b`."""
    return "".join(_written(char) if _is_unprintable(char) else char for char in text)


def say(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print it so."""
    typer.echo(printable(text), err=err, nl=nl)


def _is_unprintable(char: str) -> bool:
    return char not in _KEPT and (unicodedata.category(char) in ("Cc", "Cs") or char in _TURNS)


def _written(char: str) -> str:
    return char.encode("unicode_escape", errors="surrogatepass").decode()
