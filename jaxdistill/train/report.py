"""The report of a run: one HTML file with everything in it, readable in light and in dark."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxdistill.train.chart import Points, line_chart
from jaxdistill.train.report_style import STYLE
from jaxdistill.workdir import write_atomically


def write_report(
    path: epath.PathLike,
    *,
    title: str,
    summary: Sequence[str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    curves: Mapping[str, Mapping[str, Points]],
    samples: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
) -> None:
    """Writes a self-contained HTML page; it refers to nothing outside itself.

    Args:
        path: of the page; replaced as a whole or not at all.
        title: what was run.
        summary: paragraphs on what came out.
        tables: caption -> rows; the keys of the first row name the columns.
        curves: caption -> {series: (x, y) points}, as `curve` makes them.
        samples: prompt -> {model: its text}.
        config: nested dictionaries, shown folded.

    Raises:
        ValueError: a row of a table has other columns than its first row.
    """
    sections = [
        *(_table(caption, rows) for caption, rows in tables.items()),
        _charts(curves),
        _samples(samples),
        _config(config),
    ]
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in summary)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><header><h1>{html.escape(title)}</h1>{paragraphs}</header>\n"
        f"{chr(10).join(section for section in sections if section)}\n</main></body></html>\n"
    )
    write_atomically(epath.Path(path), page)


def curve(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Points]:
    """One metric of `read_metrics` rows as {run: [(step, value), ...]}.

    >>> curve([{"run": "kd", "step": 1, "loss": 2.0}, {"run": "kd", "step": 1, "ppl": 9}], "loss")
    {'kd': [(1, 2.0)]}
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if metric in row:
            series.setdefault(row["run"], []).append((row["step"], row[metric]))
    return dict(series)


def _table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A section with one table; columns of numbers are set flush right."""
    if not rows:
        return ""
    columns = list(rows[0])
    for number, row in enumerate(rows, start=1):
        if list(row) != columns:
            raise ValueError(
                f"row {number} of the table {caption!r} has the columns {list(row)}, expected "
                f"those of the first row, {columns}"
            )
    numeric = {c for c in columns if all(_is_number(r[c]) or r[c] is None for r in rows)}

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = [' class="number"' if column in numeric else "" for column in columns]
        made = zip(kinds, values, strict=True)
        return "<tr>" + "".join(f"<{tag}{k}>{html.escape(v)}</{tag}>" for k, v in made) + "</tr>"

    body = "".join(cells("td", [format_value(row[column]) for column in columns]) for row in rows)
    return (
        f'<section><h2>{html.escape(caption)}</h2><div class="scroll"><table>'
        f"<thead>{cells('th', columns)}</thead><tbody>{body}</tbody></table></div></section>"
    )


def _charts(curves: Mapping[str, Mapping[str, Points]]) -> str:
    """A section with one chart a caption, side by side where there is room."""
    charts = "".join(
        f'<div class="card"><h3>{html.escape(caption)}</h3>{line_chart(series)}</div>'
        for caption, series in curves.items()
    )
    return f'<section><h2>Curves</h2><div class="charts">{charts}</div></section>' if charts else ""


def _samples(samples: Mapping[str, Mapping[str, str]]) -> str:
    """A section with what each model makes of each prompt."""
    blocks = []
    for prompt, texts in samples.items():
        answers = "".join(
            f"<dt>{html.escape(model)}</dt><dd>{html.escape(text)}</dd>"
            for model, text in texts.items()
        )
        blocks.append(
            f'<div class="card"><p class="prompt">{html.escape(prompt)}</p><dl>{answers}</dl></div>'
        )
    return f"<section><h2>Samples</h2>{''.join(blocks)}</section>" if blocks else ""


def _config(config: Mapping[str, Any]) -> str:
    """A folded section with every setting by its dotted name."""
    if not config:
        return ""
    rows = "".join(
        f"<tr><td><code>{html.escape(key)}</code></td><td>{html.escape(str(value))}</td></tr>"
        for key, value in _dotted(config)
    )
    return (
        "<section><details><summary>Configuration</summary>"
        f'<div class="scroll"><table class="config"><tbody>{rows}</tbody></table></div>'
        "</details></section>"
    )


def _dotted(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            pairs += _dotted(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_value(value: Any) -> str:
    """A table cell: 4 significant digits, thousands set apart, an en dash for None.

    >>> format_value(134515008), format_value(0.123456), format_value(12345.6), format_value(None)
    ('134,515,008', '0.1235', '12,346', '–')
    """
    if value is None:
        return "–"
    if not _is_number(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "not a number"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
