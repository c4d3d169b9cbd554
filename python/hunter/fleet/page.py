# SPDX-License-Identifier: MIT
"""A service map as one HTML page with a drawing (SVG); it needs no network to open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from hunter.show.text import plain
from hunter.show.units import amount

__all__ = ["of_map"]

_HEIGHT, _WIDTH, _MIDDLE = 26, 1100, 340
_DRAWN = 150
"""Lines in the drawing; the table has all."""
_TOLD = 5
"""Services that a line names."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Service map</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 15px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}
svg text {{ font: 13px system-ui, sans-serif; fill: #222 }}
svg path {{ fill: none; stroke: #3b7dd8; stroke-opacity: .4 }}
svg path:hover {{ stroke-opacity: 1 }}
svg path.part {{ stroke: #c77d0a; stroke-dasharray: 4 3 }}
table {{ border-collapse: collapse; margin-top: 2em }}
td, th {{ padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums }}
@media (prefers-color-scheme: dark) {{
 body {{ color: #ddd; background: #181a1b }} svg text {{ fill: #ddd }}
 td, th {{ border-color: #444 }}
}}
</style></head><body>
<h1>Service map</h1><p>{when}. {hosts}</p>
{drawing}
<table><tr><th>client<th>server<th>service<th class="n">connections<th class="n">bytes<th>why</tr>
{rows}
</table></body></html>"""


def of_map(rows: Sequence[Mapping[str, Any]], range: Any, hosts: Sequence[Any]) -> str:
    """Return the page of service_map()'s rows."""
    begin, end = (
        f"{datetime.fromtimestamp(ns / 1e9):%Y-%m-%d %H:%M:%S}"
        for ns in (range.since_ns, range.until_ns)
    )
    partial = [plain(one.name) for one in hosts if not one.whole]
    told = (
        f"{len(hosts)} machine{'s' * (len(hosts) != 1)}." if hosts else "One machine's own history."
    )
    if partial:
        told += f" Silent or with losses: {', '.join(partial)}."
    return _PAGE.format(
        when=f"{begin} to {end}",
        hosts=escape(told),
        drawing=_drawing(rows),
        rows="\n".join(map(_row, rows)),
    )


def _service(one: Mapping[str, Any]) -> str:
    return f"{ {6: 'tcp', 17: 'udp'}.get(one['protocol'], one['protocol']) } {one['service']}"


def _why(one: Mapping[str, Any]) -> str:
    return "AMBIGUOUS" if one["ambiguous"] else one["reason"] or ""


def _row(one: Mapping[str, Any]) -> str:
    texts = (plain(one["client"]), plain(one["server"]), _service(one))
    numbers = (f"{one['connections']:,}", amount(one["bytes"], "bin-bytes"))
    cells = "".join(f"<td>{escape(text)}" for text in texts)
    cells += "".join(f'<td class="n">{number}' for number in numbers)
    return f"<tr>{cells}<td>{escape(_why(one))}</tr>"


def _drawing(rows: Sequence[Mapping[str, Any]]) -> str:
    """Clients on the left, servers on the right, a line for each pair: wider if more bytes."""
    pairs: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for one in rows:
        pairs.setdefault((one["client"], one["server"], _why(one)), []).append(one)
    bytes_of = {pair: sum(one["bytes"] for one in some) for pair, some in pairs.items()}
    drawn = sorted(pairs, key=lambda pair: -bytes_of[pair])[:_DRAWN]
    if not drawn:
        return ""
    sides = [
        {name: (number + 1) * _HEIGHT for number, name in enumerate(dict.fromkeys(names))}
        for names in ([pair[side] for pair in drawn] for side in (0, 1))
    ]
    most = bytes_of[drawn[0]] or 1
    lines = []
    for pair in drawn:
        client, server, why = pair
        left, right = sides[0][client] - 4, sides[1][server] - 4
        begin, end = _MIDDLE, _WIDTH - _MIDDLE
        bend = (begin + end) // 2
        width = 1 + 7 * (bytes_of[pair] / most) ** 0.5
        kind = ' class="part"' if why else ""
        services = [_service(one) for one in pairs[pair]]
        more = f" and {len(services) - _TOLD} more" if len(services) > _TOLD else ""
        size = amount(bytes_of[pair], "bin-bytes")
        title = f"{client} > {server}: {', '.join(services[:_TOLD])}{more}; {size} {why}"
        lines.append(
            f'<path{kind} stroke-width="{width:.1f}" d="M{begin} {left} C{bend} {left} {bend}'
            f' {right} {end} {right}"><title>{escape(plain(title))}</title></path>'
        )
    for names, at, anchor in (
        (sides[0], _MIDDLE - 8, "end"),
        (sides[1], _WIDTH - _MIDDLE + 8, "start"),
    ):
        for name, y in names.items():
            text = escape(plain(name)[:44])
            lines.append(f'<text x="{at}" y="{y}" text-anchor="{anchor}">{text}</text>')
    height = (max(map(len, sides)) + 1) * _HEIGHT
    return f'<svg width="{_WIDTH}" height="{height}" role="img">{"".join(lines)}</svg>'
