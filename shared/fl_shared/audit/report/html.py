"""The page as one HTML file: no script runs, nothing is fetched, the signed JSON is embedded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fl_shared.audit.report.page import Section, running_head, title
from fl_shared.errors import ConfigError

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ left }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #111 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: .8em 0; font-size: .88em }
th, td { border: 1px solid #ccc; padding: .25em .5em; text-align: left; vertical-align: top; overflow-wrap: anywhere }
@page { margin: 22mm 16mm; @top-left { content: "{{ left }}" } @top-right { content: "{{ right }}" }
  @bottom-right { content: "Page " counter(page) " of " counter(pages) } }
@media print { h2 { break-after: avoid } figure, tr { break-inside: avoid } .head { display: none } }
.head { display: flex; justify-content: space-between; color: #555; font-size: .88em }
.sign td { height: 2.4em; min-width: 9em } .lead { white-space: pre-line }
th { background: #f3f3f3 } svg { max-width: 100%; height: auto } .seal { overflow-wrap: anywhere; font-size: .88em }
</style></head><body>
<div class="head"><span>{{ left }}</span><span>{{ right }}</span></div>
<h1>{{ title }}</h1>
{% for section in sections %}{% if section.title %}<h2>{{ section.title }}</h2>{% endif %}
{% for block in section.blocks %}{% if block is string %}<p>{{ block }}</p>
{% elif block.svg is defined %}<figure role="img" aria-label="{{ block.alt }}">{{ block.svg | safe }}</figure>
{% elif block.signers is defined %}
<table class="sign"><thead><tr><th></th>
<th>Name</th><th>Function</th><th>Date</th><th>Signature</th></tr></thead>
<tbody>{% for signer in block.signers %}<tr><th>{{ signer }}</th>
<td></td><td></td><td></td><td></td></tr>{% endfor %}</tbody></table>
{% else %}<table>{% if block.head | join %}<thead><tr>
{% for cell in block.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>{% endif %}<tbody>
{% for row in block.rows %}<tr>{% for cell in row %}<td class="lead">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% endif %}{% endfor %}{% endfor %}
<h2>Electronic signature</h2>
<p class="seal">Ed25519 by key {{ key }}<br>{{ signature }}</p>
<p>The signed document is part of this file; check it with: fl-audit statement --check FILE --public-key KEY</p>
<script type="application/json" id="statement">{{ embedded | safe }}</script>
</body></html>
"""
_OPEN, _CLOSE = '<script type="application/json" id="statement">', "</script>"


def render(sections: Sequence[Section], document: dict[str, Any]) -> str:
    """Return the page. Needs jinja2 (the extra `report`)."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    left, right = running_head(document["body"])
    return environment.from_string(_TEMPLATE).render(
        title=title(document["body"]),
        left=left,
        right=right,
        sections=sections,
        key=document["key"],
        signature=document["signature"],
        # "</" would end the element; the escape is the same JSON.
        embedded=json.dumps(document, ensure_ascii=False, sort_keys=True).replace("<", "\\u003c"),
    )


def embedded(text: str) -> str:
    """Return the signed JSON inside a page; ConfigError when there is none."""
    start = text.find(_OPEN)
    end = text.find(_CLOSE, start)
    if start < 0 or end < 0:
        raise ConfigError("the page holds no signed statement", fix="check the .json file instead")
    return text[start + len(_OPEN) : end]
