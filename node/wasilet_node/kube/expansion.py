"""``$(NAME)`` references in env values, command, args and subPathExpr.

The rules are Kubernetes' (``third_party/forked/golang/expansion``): ``$(NAME)`` is replaced when NAME is known and left
as it is when not; ``$$`` is an escaped ``$``; a ``$`` before anything else stays. One pass: what a value brings in is
not expanded again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping


def mapping_for(*contexts: Mapping[str, str]) -> Callable[[str], str]:
    """Looks a name up in each of ``contexts`` in turn; an unknown name gives its reference back, ``$(NAME)``."""

    def mapping(name: str) -> str:
        for context in contexts:
            if name in context:
                return context[name]
        return f"$({name})"

    return mapping


def expand(text: str, mapping: Callable[[str], str]) -> str:
    """``text`` with every reference replaced by what ``mapping`` gives for its name."""
    if "$" not in text:
        return text
    result: list[str] = []
    position = 0
    while (dollar := text.find("$", position)) != -1 and dollar + 1 < len(text):
        result.append(text[position:dollar])
        following = text[dollar + 1]
        if following == "$":
            result.append("$")
            position = dollar + 2
        elif following == "(" and (end := text.find(")", dollar + 2)) != -1:
            result.append(mapping(text[dollar + 2 : end]))
            position = end + 1
        else:
            result.append("$" + following)
            position = dollar + 2
    result.append(text[position:])
    return "".join(result)
