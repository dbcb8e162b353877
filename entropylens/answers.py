"""The answer in a response: its last box, and whether it reads as the gold answer does."""

from __future__ import annotations

import re

__all__ = ["last_boxed", "normalized", "reads_as", "strict_match"]

_PIECES = re.compile(
    r"\\boxed(?![A-Za-z])\s*(?:(?P<box>\{)|(?P<number>-?[0-9][0-9.,/]*))?"
    r"|\\\\(?!boxed(?![A-Za-z]))"  # a line break, unless the box's own backslash was doubled
    r"|\\[{}]"  # a brace that is printed groups nothing
    r"|(?P<brace>[{}])"
)
_FRACTION = re.compile(r"(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))")


def last_boxed(text: str) -> str | None:
    r"""What the last balanced `\boxed{...}`, or `\boxed 5`, holds; None without any.

    Boxes that never close are skipped. One pass: the time is linear in the text.
    """
    starts: list[int] = []  # of the content of each open brace; -1 where it opens no box
    last, found = -1, None
    for piece in _PIECES.finditer(text):
        start = -1
        if piece["number"]:
            start, content = piece.start("number"), piece["number"].rstrip(".,/")
        elif piece["box"]:
            starts.append(piece.end())
        elif piece["brace"] == "{":
            starts.append(-1)
        elif piece["brace"] and starts:
            start = starts.pop()
            content = text[start : piece.start()]
        if start > last:
            last, found = start, content
    return found


def strict_match(response: str, gold: str) -> bool:
    """Whether the last box equals the gold answer once both are normalized.

    This is how the paper's reward compares. No box, or a blank one, is never right.
    """
    answer = last_boxed(response)
    return answer is not None and reads_as(answer, gold)


def reads_as(answer: str, gold: str) -> bool:
    """Whether both are the same text, and not nothing, once normalized."""
    text = normalized(answer)
    return text != "" and text == normalized(gold)


def normalized(answer: str) -> str:
    r"""One spelling for the many of one answer, after the rules that go with the MATH data.

    Dropped: blanks, `\left`, `\right`, degrees, `\$`, `\%`, a trailing `\text{ unit}`, and a
    name of one letter before "=". Respelled: `\dfrac`, `\frac12`, `\sqrt3`, `.5`, `0.5`, `3/4`.
    """
    text = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub("[td]frac", "frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\^\{\\circ\}|\^\\circ|\\\$", "", text)
    value, *units = text.split("\\text{ ")
    if len(units) == 1:
        text = value
    text = re.sub(r"\\{1,2}%", "", text).replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = f"0{text}"
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])(?=\{)", r"\\frac{\1}", text)
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return _FRACTION.sub(r"\\frac{\1}{\2}", text) if _FRACTION.fullmatch(text) else text
