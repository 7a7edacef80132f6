"""Render chat templates that are damaged, hostile or both: ``python -m tools.fuzz templates``."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path
from typing import Any, Final

from gguflora.errors import RequestError
from gguflora.runtime.templates import TemplateRenderer

SECONDS: Final = 0.5
MEMORY: Final = 64 << 20
MAX_CHARS: Final = 100_000
_SPARE: Final = 10.0
"""Seconds that a rendering may take beyond its limit: a new process starts, and the machine may be busy."""
_GROWTH: Final = 64 << 20
_SECRET: Final = "GGUFLORA_FUZZ_SECRET"
_FRESH: Final = "RENDERED"

SOUND: Final = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message['content'] | trim }}{{ eos_token }}"
    "\n{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- for m in messages %}\n    {%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% break %}{% endif %}\n"
    "    {{- m.content }}\n{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(messages[1]['content']) }}{{ messages[::-1][0].role | upper }}",
    "{% if tools %}{{ tools | tojson(indent=2) }}{% else %}none{% endif %}{{ strftime_now('%Y') }}",
)
"""Templates as models have them."""

VARIABLES: Final[dict[str, Any]] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 中文 <b>&\ud83d\n  "},
        {"role": "assistant", "content": "ok", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
}

_NUMBERS: Final = ("0", "1", "3", "99", "9999", "10**9", "10**18", "-1", "1e308", "2**70")
_TEXTS: Final = (
    "''", "'x'", "'ab' * 999", "bos_token", "messages[0].content", "'%s'", "'%999999999d'", "'{0}'", "'{0:>999999999}'",
    "'{0.__class__}'", "'\\u0000'", "'%' ~ '9' * 9 ~ 's'",
)  # fmt: skip
_OBJECTS: Final = (
    "messages", "tools", "messages[1]", "namespace(a=1)", "cycler(1, 2)", "joiner('x')", "dict(a=1)", "lipsum",
    "range", "self", "loop", "caller", "varargs", "raise_exception", "strftime_now", "none", "[[1], [2]]", "undefined",
    "''.format", "''.join", "messages.append", "lipsum.__globals__", "cycler.__init__", "''.__class__.__mro__",
)  # fmt: skip
_FILTERS: Final = (
    "abs", "attr('format')", "attr('__class__')", "attr('format_map')", "batch(3)", "batch(10**9)", "capitalize",
    "center(10**9)", "default(1)", "dictsort", "escape", "filesizeformat", "first", "float", "forceescape", "format(1)",
    "groupby('role')", "indent(10**8)", "int", "items", "join('x' * 9999)", "last", "length", "list", "lower",
    "map('upper')", "map(attribute='__class__')", "max", "min", "pprint", "random", "reject('none')",
    "replace('', 'x' * 99999)", "reverse", "round(999)", "safe", "select", "selectattr('role')", "slice(10**8)", "sort",
    "string", "striptags", "sum", "title", "tojson", "tojson(indent=10**8)", "trim", "truncate(9)", "unique", "upper",
    "urlencode", "urlize", "wordcount", "wordwrap(1)", "xmlattr",
)  # fmt: skip
_TESTS: Final = ("defined", "mapping", "iterable", "callable", "sameas none", "in messages", "divisibleby 0", "filter")
_BYTES: Final = ("{{", "}}", "{%", "%}", "{#", "#}", "-", "(", ")", "[", "]", "'", "|", "~", ".", "\\", "\0", "\x1b")


def template(dice: random.Random) -> str:
    """Return a template: a sound one that is damaged, or one of a grammar that knows what hurts."""
    if dice.random() < 0.3:
        return _damaged(dice.choice(SOUND), dice)
    text = "".join(_statement(dice, 0) for _ in range(dice.randrange(1, 4)))
    return _damaged(text, dice) if dice.random() < 0.2 else text


def _damaged(text: str, dice: random.Random) -> str:
    for _ in range(dice.choice([1, 1, 2, 4])):
        at, size = dice.randrange(len(text) + 1), dice.choice([0, 1, 5])
        text = text[:at] + dice.choice(["", *_BYTES, _expression(dice, 1), "(" * 2000]) + text[at + size :]
    return text


def _expression(dice: random.Random, depth: int) -> str:
    if depth > 3:
        return dice.choice([*_NUMBERS, *_TEXTS, *_OBJECTS])
    first, second = _expression(dice, depth + 1), _expression(dice, depth + 1)
    return dice.choice(
        [
            f"{first} | {dice.choice(_FILTERS)}",
            f"({first}) | {dice.choice(_FILTERS)} | {dice.choice(_FILTERS)}",
            f"({first}) {dice.choice(['*', '**', '~', '+', '%', '//', '-', '/', 'in', '=='])} ({second})",
            f"({first})[{second}]",
            f"({first}).{dice.choice(['format', 'join', '__class__', 'a', 'append', 'items', 'format_map', 'mro'])}",
            f"({first})({second})",
            f"range({dice.choice(_NUMBERS)})",
            f"({first}) is {dice.choice(_TESTS)}",
            dice.choice([*_NUMBERS, *_TEXTS, *_OBJECTS]),
            dice.choice(_TEXTS),
        ]
    )


def _statement(dice: random.Random, depth: int) -> str:
    value = _expression(dice, 1)
    if depth > 3:
        return f"{{{{ {value} }}}}"
    inside = "".join(_statement(dice, depth + 1) for _ in range(dice.randrange(1, 3)))
    return dice.choice(
        [
            f"{{{{ {value} }}}}",
            f"{{{{ {value} }}}}",
            f"{{% for i in range({dice.choice(_NUMBERS)}) %}}{inside}{{% endfor %}}",
            f"{{% for i in {value} %}}{inside}{{% endfor %}}",
            f"{{% for i in messages recursive %}}{inside}{{{{ loop(messages) }}}}{{% endfor %}}",
            f"{{% if {value} %}}{inside}{{% else %}}x{{% endif %}}",
            f"{{% set v = {value} %}}{inside}{{{{ v }}}}",
            f"{{% set v %}}{inside}{{% endset %}}{{{{ v * 9999 }}}}",
            f"{{% macro m(x) %}}{inside}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m({value}) }}}}",
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}" + inside,
            "{% set n = namespace(x=[]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
            f"{{% filter {dice.choice(_FILTERS)} %}}{inside}{{% endfilter %}}",
            f"{{% call({value}) m() %}}{inside}{{% endcall %}}",
            f"{{% include {dice.choice(_TEXTS)} %}}{inside}",
            "{% import '/etc/passwd' as p %}{{ p }}",
            f"{{% extends {dice.choice(_TEXTS)} %}}{{% block a %}}{inside}{{{{ super() }}}}{{% endblock %}}",
            f"{{% generation %}}{inside}{{% endgeneration %}}",
            "{{ raise_exception('x' * 10**7) }}",
            f"{{{{ strftime_now({dice.choice(_TEXTS)}) }}}}",
        ]
    )  # fmt: skip


def _resident() -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10


def fuzz(seconds: float, seed: int) -> tuple[int, list[str]]:
    """Render templates for some time.

    Returns:
        The number of templates, and what was found: an exception other than `RequestError`, a text or message that is
        too long or holds the environment, a rendering that takes too long, growth of this process.
    """
    dice, found = random.Random(seed), dict[str, None]()
    os.environ[_SECRET] = _SECRET.lower()
    renderer = TemplateRenderer(seconds=SECONDS, memory=MEMORY, max_chars=MAX_CHARS, processes=1)
    trials, end, before = 0, time.monotonic() + seconds, _resident()
    try:
        while time.monotonic() < end:
            text = template(dice)
            trials += 1
            if what := judge(renderer, text):
                found[f"{what}: {text[:500]!r}"] = None
        if renderer.render("{{ x }}", {"x": _FRESH}) != _FRESH:
            found["the renderer renders no more"] = None
        if (grown := _resident() - before) > _GROWTH:
            found[f"this process has grown by {grown >> 20} MB"] = None
    finally:
        renderer.close()
        del os.environ[_SECRET]
    return trials, list(found)


def judge(renderer: TemplateRenderer, text: str) -> str | None:
    """Return what is wrong with a rendering; None if nothing is."""
    begun = time.monotonic()
    try:
        said = renderer.render(text, VARIABLES)
        longest = MAX_CHARS
    except RequestError as error:
        said, longest = str(error), 2000
    except Exception as error:
        return f"{error!r:.300}"
    if (took := time.monotonic() - begun) > SECONDS + _SPARE:
        return f"it took {took:.1f} s"
    if len(said) > longest:
        return f"{len(said)} characters"
    return "it shows the environment" if _SECRET.lower() in said else None
