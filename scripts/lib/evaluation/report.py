# SPDX-License-Identifier: Apache-2.0
"""The Markdown table and the HTML report of results: one file, no script, no request to the network."""

import base64
import html
import io
import math

from PIL import Image

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#4f5d75", "#d1495b", "#00798c")
MAX_THUMB_PX = 192
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 0 1rem 3rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; }
td { white-space: nowrap; } th { vertical-align: bottom; min-width: 4rem; }
.wide td:first-child { position: sticky; left: 0; background: Canvas; }
thead th { background: var(--soft); }
td small { opacity: 0.7; display: block; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; } svg text { fill: currentColor; font-size: 14px; }
.pictures td { padding: 2px; border: 0; } .pictures th { border: 0; font-weight: normal; }
.pictures img { display: block; width: clamp(5rem, 22vw, 12rem); height: auto; image-rendering: pixelated; }
"""


def number(value, digits=3):
    """Return a figure with some significant digits, thousands in full; "–" for None."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def interval(figure):
    """Return `[low, high]` of a figure, with digits enough to see its width; "" without one."""
    if not figure or figure["low"] is None:
        return ""
    largest, width = (abs(figure["high"]), figure["high"] - figure["low"])
    digits = 3
    if width > 0 and largest > 0:
        digits = min(6, max(2, 2 + math.floor(math.log10(largest)) - math.floor(math.log10(width))))
    return f"[{number(figure['low'], digits)}, {number(figure['high'], digits)}]"


def columns(results):
    """Return the figures that any row has, in the order of results["figures"]: {key: title}."""
    used = set().union(*(row["figures"] for row in results["rows"]))
    return {key: title for key, title in results["figures"].items() if key in used}


def facts(row):
    """Return (first cells of a row: label, steps, guidance; last ones: evaluations, memory)."""
    first = [row["label"], str(row["steps"]), f"{row['guidance']:g}"]
    return first, [f"{row['evaluations']:g}", number(row["peak_gib"])]


def series(row):
    """Return the name of the line that a row is a point of."""
    return f"{row['label']}, guidance {row['guidance']:g}"


FIRST, LAST = ["sampler", "steps", "guidance"], ["UNet evaluations a picture", "peak GiB"]


def markdown_table(results):
    """Return the rows as a Markdown table, each figure with its 95% interval."""
    titles = columns(results)
    head = [*FIRST, *titles.values(), *LAST]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in results["rows"]:
        (first, last), figures = facts(row), [row["figures"].get(key) for key in titles]
        cells = [f"{number(f['value'])} {interval(f)}".strip() if f else "–" for f in figures]
        lines.append("| " + " | ".join([*first, *cells, *last]) + " |")
    return "\n".join(lines)


def summary(results):
    """Return (head, body) of the table of README: a line for each sampler, distance / score by steps.

    A solver with several guidances has two lines: at the teacher's guidance and at its best one.
    """
    used = columns(results)
    distance = next(key for key in used if key.startswith("FD/") and key.endswith("/teacher"))
    score = next((key for key in ("accuracy", "clip_score") if key in used), None)
    teacher, *rows = results["rows"]
    steps = sorted({row["steps"] for row in rows})
    smallest = min(max(row["figures"][distance]["value"], 1e-3) for row in results["rows"])
    decimals = max(1, 1 - math.floor(math.log10(smallest)))

    def cell(row):
        keys = [(distance, decimals)] + ([(score, 3)] if score else [])
        figures = [(row["figures"][key], digits) for key, digits in keys]
        halves = ["" if f["low"] is None else f" ± {(f['high'] - f['low']) / 2:.{d}f}" for f, d in figures]
        return " / ".join(f"{f['value']:.{d}f}{half}" for (f, d), half in zip(figures, halves, strict=True))

    body = []
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        guidances = list(dict.fromkeys(row["guidance"] for row in mine))
        first = {row["steps"]: cell(row) for row in mine if row["guidance"] == guidances[0]}
        body.append([f"{label}, guidance {guidances[0]:g}", *(first.get(n, "–") for n in steps)])
        if len(guidances) > 1:
            of_steps = ([row for row in mine if row["steps"] == n] for n in steps)
            best = [min(found, key=lambda row: row["figures"][distance]["value"]) for found in of_steps]
            body.append([f"{label}, its best guidance", *(f"{cell(r)} ({r['guidance']:g})" for r in best)])
    text = f"Teacher, {teacher['steps']} steps, guidance {teacher['guidance']:g}: {cell(teacher)} (floor)"
    name = f"{used[distance]}{' / ' + SHORT[score] if score else ''}"
    return [name, *(f"{n} step{'s' * (n > 1)}" for n in steps)], body, text


SHORT = {"accuracy": "accuracy", "clip_score": "CLIP score"}


def summary_table(results):
    """Return the summary as Markdown."""
    head, body, floor = summary(results)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{floor}"


def html_table(head, body):
    """Return an HTML table that scrolls sideways where it is too wide; cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def results_table(results):
    """Return the rows as HTML."""
    titles = columns(results)
    body = []
    for row in results["rows"]:
        (first, last), cells = facts(row), []
        for key in titles:
            figure = row["figures"].get(key)
            small = interval(figure)
            cells.append((number(figure["value"]) if figure else "–") + (small and f"<small>{small}</small>"))
        body.append([*map(html.escape, first), *cells, *last])
    return html_table([html.escape(title) for title in [*FIRST, *titles.values(), *LAST]], body)


def ticks(low, high, is_log):
    """Return the values that an axis marks."""
    if not is_log:
        step = 10 ** math.floor(math.log10((high - low) or 1))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 6)
        return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p * 1.0001 <= high * 1.001]
    return marks if len(marks) < 8 else [mark for mark in marks if math.log10(mark) % 1 < 1e-6]


class Axis:
    """A map of values to a stretch of the picture, linear or logarithmic."""

    def __init__(self, values, start, end, is_log):
        """Fit the axis to values."""
        low, high = min(values), max(values)
        self.is_log = is_log and low > 0
        if self.is_log:
            low, high = low / 1.15, high * 1.15
        else:
            margin = 0.05 * (high - low) or 0.5
            low, high = low - margin, high + margin
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value):
        """Return the pixel of a value; one outside the axis is at its nearer end."""
        value = min(max(value, self.low), self.high)
        ends = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        share = ((math.log(value) if self.is_log else value) - ends[0]) / (ends[1] - ends[0])
        return self.start + share * (self.end - self.start)


def plot(title, x_title, lines, marks=None):
    """Return a line plot as SVG; lines: {label: [(x, value, low, high)]}, x logarithmic.

    `marks` are the values of x to name; without them the axis chooses.
    """
    points = [point for line in lines.values() for point in line]
    values = [p[1] for p in points]
    is_log = min(values) > 0 and max(values) > 20 * min(values)
    seen = values + [edge for p in points for edge in p[2:] if edge is not None and (edge > 0 or not is_log)]
    height = 312 + 18 * len(lines)
    x, y = Axis([p[0] for p in points], 62, 450, True), Axis(seen, 262, 34, is_log)
    parts = [f'<text x="8" y="18" font-weight="bold">{html.escape(title)}</text>']
    for tick in marks or ticks(x.low, x.high, x.is_log):
        place = f'x="{x(tick):.1f}" y="280" text-anchor="middle"'
        parts.append(f"<text {place}>{tick:g}</text>")
    for tick in ticks(y.low, y.high, y.is_log):
        level = f"{y(tick):.1f}"
        parts.append(f'<path d="M62 {level}H450" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="56" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="256" y="297" text-anchor="middle">{html.escape(x_title)}</text>')
    for number_, (label, line) in enumerate(lines.items()):
        colour, dash = COLOURS[number_ % len(COLOURS)], "5 4" * (number_ >= len(COLOURS))
        spots = [(x(px), y(value)) for px, value, *_ in line]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)
        stroke = f'stroke="{colour}" stroke-width="2" fill="none"'
        parts.append(f'<path d="{path}" {stroke} stroke-dasharray="{dash}"/>')
        for (a, b), (_, _, low, high) in zip(spots, line, strict=True):
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>')
            if low is not None:
                parts.append(f'<path d="M{a:.1f} {y(low):.1f}V{y(high):.1f}" {stroke} stroke-opacity=".5"/>')
        at = 320 + 18 * number_
        parts.append(f'<path d="M62 {at - 4}h20" {stroke} stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="90" y="{at}">{html.escape(label)}</text>')
    head = f'<svg viewBox="0 0 460 {height}" role="img" aria-label="{html.escape(title)} by {x_title}">'
    return f"<figure>{head}{''.join(parts)}</svg></figure>"


def plots(results):
    """Return a pair of plots for each figure but the seconds: over steps, and over seconds a picture."""
    found = []
    for key, title in columns(results).items():
        over_steps, over_time = {}, {}
        for row in results["rows"]:
            figure, seconds = row["figures"].get(key), row["figures"].get("seconds")
            if key == "seconds" or not figure or not seconds:
                continue
            place = (figure["value"], figure["low"], figure["high"])
            over_steps.setdefault(series(row), []).append((row["steps"], *place))
            over_time.setdefault(series(row), []).append((seconds["value"], *place))
        if over_steps:
            steps = sorted({point[0] for line in over_steps.values() for point in line})
            found.append(plot(title, "steps", over_steps, steps))
            found.append(plot(title, "seconds a picture", over_time))
    return f'<div class="plots">{"".join(found)}</div>'


def data_uri(picture):
    """Return a picture as a data URI, at most MAX_THUMB_PX wide: PNG if small as it is, else JPEG."""
    kind = "PNG" if picture.width <= MAX_THUMB_PX else "JPEG"
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_THUMB_PX, 4 * MAX_THUMB_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_grid(results, pictures):
    """Return a block of pictures per prompt; pictures: {(row name, index): PIL}, index < results["shown"]."""
    blocks = []
    for index in range(results["shown"]):
        prompt = results["prompts"][index % len(results["prompts"])]
        lines = {}
        for row in results["rows"]:
            lines.setdefault(series(row), []).append(row)
        body = []
        for label, rows in lines.items():
            cells = [f"<th>{html.escape(label)}</th>"]
            for row in rows:
                alt = html.escape(f"{prompt}: {label}, {row['steps']} steps", quote=True)
                picture = f'<img alt="{alt}" src="{data_uri(pictures[row["name"], index])}">'
                cells.append(f"<td>{picture}<small>{row['steps']} steps</small></td>")
            body.append(f"<tr>{''.join(cells)}</tr>")
        table = f'<div class="wide"><table class="pictures">{"".join(body)}</table></div>'
        blocks.append(f"<h3>{html.escape(prompt)}</h3>{table}")
    return "".join(blocks)


def bias_table(results):
    """Return, as HTML, the distance of two draws of the teacher at several numbers of pictures."""
    body = [
        [html.escape(name), str(point["pictures"]), number(point["distance"])]
        for name, curve in results["bias"].items()
        for point in curve
    ]
    return html_table(["features", "pictures", "Fréchet distance of two draws of the teacher"], body)


def html_report(results, pictures):
    """Return the report as one HTML page."""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in results["notes"])
    settings = [[html.escape(str(key)), html.escape(str(value))] for key, value in results["settings"].items()]
    title = html.escape(f"{results['settings']['teacher']}: few-step samplers compared")
    head, body, floor = summary(results)
    brief = html_table(map(html.escape, head), [map(html.escape, cells) for cells in body])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>
<body><h1>{title}</h1>
{brief}<p>{html.escape(floor)}</p>
<h2>How to read the figures</h2><ul>{notes}</ul>
<h2>Figures</h2>{results_table(results)}
<h2>Quality over steps and over time</h2>{plots(results)}
<h2>Pictures, the same noise in each column</h2>{picture_grid(results, pictures)}
<h2>What small samples add to the Fréchet distance</h2>{bias_table(results)}
<h2>Settings</h2>{html_table(["setting", "value"], settings)}
</body></html>
"""
