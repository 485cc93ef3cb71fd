# SPDX-License-Identifier: Apache-2.0
"""The Markdown table and the HTML report of results: one file, no script, no request to the network."""

import base64
import html
import io
import math
import re

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


def with_interval(figure):
    """Return `value [low, high]`, the interval with digits enough to see its width."""
    if not figure or figure["low"] is None:
        return number(figure and figure["value"])
    largest, width, digits = abs(figure["high"]), figure["high"] - figure["low"], 3
    if width > 0 and largest > 0:
        digits = min(6, max(2, 2 + math.floor(math.log10(largest)) - math.floor(math.log10(width))))
    return f"{number(figure['value'])} [{number(figure['low'], digits)}, {number(figure['high'], digits)}]"


def columns(results):
    """Return the figures that any row has, in the order of results["figures"]: {key: title}."""
    used = set().union(*(row["figures"] for row in results["rows"]))
    return {key: title for key, title in results["figures"].items() if key in used}


def full_table(results):
    """Return (head, body) of the table of all rows and figures, each with its 95% interval."""
    titles, body = columns(results), []
    for row in results["rows"]:
        figures = [with_interval(row["figures"].get(key)) for key in titles]
        first = [row["label"], str(row["steps"]), f"{row['guidance']:g}"]
        body.append([*first, *figures, f"{row['evaluations']:g}", number(row["peak_gib"])])
    last = ["UNet evaluations a picture", "peak GiB"]
    return ["sampler", "steps", "guidance", *titles.values(), *last], body


def summary(results):
    """Return (head, body, line of the teacher): a line for each sampler, distance / score by steps.

    A solver with several guidances has two lines: at the teacher's guidance and at its best one.
    """
    used = columns(results)
    distance = next(key for key in used if key.startswith("FD/") and key.endswith("/teacher"))
    score = next((key for key in ("accuracy", "clip_score") if key in used), None)
    smallest = min(max(row["figures"][distance]["value"], 1e-3) for row in results["rows"])
    decimals = {distance: max(1, 1 - math.floor(math.log10(smallest)))} | ({score: 3} if score else {})

    def cell(row):
        parts = []
        for key, digits in decimals.items():
            figure = row["figures"][key]
            half = "" if figure["low"] is None else f" ± {(figure['high'] - figure['low']) / 2:.{digits}f}"
            parts.append(f"{figure['value']:.{digits}f}{half}")
        return " / ".join(parts)

    teacher, *rows = results["rows"]
    steps, body = sorted({row["steps"] for row in rows}), []
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        guidances = list(dict.fromkeys(row["guidance"] for row in mine))
        first = {row["steps"]: cell(row) for row in mine if row["guidance"] == guidances[0]}
        body.append([f"{label}, guidance {guidances[0]:g}", *(first[n] for n in steps)])
        if len(guidances) > 1:
            of_steps = ([row for row in mine if row["steps"] == n] for n in steps)
            best = [min(found, key=lambda row: row["figures"][distance]["value"]) for found in of_steps]
            body.append([f"{label}, its best guidance", *(f"{cell(r)} ({r['guidance']:g})" for r in best)])
    floor = f"Teacher, {teacher['steps']} steps, guidance {teacher['guidance']:g}: {cell(teacher)} (floor)"
    name = " / ".join([used[distance], *([score.replace("_", " ")] if score else [])])
    return [name, *(f"{n} step{'s' * (n > 1)}" for n in steps)], body, floor


def markdown_table(head, body):
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def html_table(head, body):
    """Return an HTML table that scrolls sideways where it is too wide; intervals are set small."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in body)
    rows = re.sub(r" (\[[^\]<]*\])</td>", r"<small>\1</small></td>", rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def axis(values, start, end, is_log):
    """Return (function from a value to its pixel, at most 8 values to mark); values outside are at an end."""
    low, high = min(values), max(values)
    if is_log:
        low, high = low / 1.15, high * 1.15
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    else:
        margin = 0.05 * (high - low) or 0.5
        low, high = low - margin, high + margin
        step = 10 ** math.floor(math.log10(high - low)) / 2
        marks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    marks = [mark for mark in marks if low <= mark <= high]
    warp = math.log if is_log else float

    def place(value):
        share = (warp(min(max(value, low), high)) - warp(low)) / (warp(high) - warp(low))
        return round(start + share * (end - start), 1)

    return place, marks[:: 1 + len(marks) // 9]


def plot(title, x_title, lines, marks=None):
    """Return a line plot as SVG; lines: {label: [(x, value, low, high)]}, x logarithmic; `marks` are x to name."""
    points = [point for line in lines.values() for point in line]
    values = [point[1] for point in points]
    is_log = min(values) > 0 and max(values) > 20 * min(values)
    seen = values + [edge for p in points for edge in p[2:] if edge is not None and (edge > 0 or not is_log)]
    (x, x_marks), (y, y_marks) = axis([p[0] for p in points], 62, 450, True), axis(seen, 262, 34, is_log)
    parts = [
        f'<text x="8" y="18" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="256" y="297" text-anchor="middle">{html.escape(x_title)}</text>',
    ]
    parts += [f'<text x="{x(mark)}" y="280" text-anchor="middle">{mark:g}</text>' for mark in marks or x_marks]
    for mark in y_marks:
        parts.append(f'<path d="M62 {y(mark)}H450" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="56" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for number_, (label, line) in enumerate(lines.items()):
        colour, dash = COLOURS[number_ % len(COLOURS)], "5 4" * (number_ >= len(COLOURS))
        stroke = f'stroke="{colour}" stroke-width="2" fill="none"'
        path, at = "M" + "L".join(f"{x(px)} {y(value)}" for px, value, *_ in line), 320 + 18 * number_
        parts.append(f'<path d="{path}" {stroke} stroke-dasharray="{dash}"/>')
        parts += [f'<circle cx="{x(px)}" cy="{y(value)}" r="3.5" fill="{colour}"/>' for px, value, *_ in line]
        bars = [f"M{x(px)} {y(low)}V{y(high)}" for px, _, low, high in line if low is not None]
        parts.append(f'<path d="{"".join(bars)}" {stroke} stroke-opacity=".5"/>')
        parts.append(f'<path d="M62 {at - 4}h20" {stroke} stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="90" y="{at}">{html.escape(label)}</text>')
    size = f'viewBox="0 0 460 {312 + 18 * len(lines)}"'
    head = f'<svg {size} role="img" aria-label="{html.escape(title)} by {x_title}">'
    return f"<figure>{head}{''.join(parts)}</svg></figure>"


def series(row):
    """Return the name of the line that a row is a point of."""
    return f"{row['label']}, guidance {row['guidance']:g}"


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
            found += [plot(title, "steps", over_steps, steps), plot(title, "seconds a picture", over_time)]
    return f'<div class="plots">{"".join(found)}</div>'


def data_uri(picture):
    """Return a picture as a data URI, at most MAX_THUMB_PX wide: PNG if small as it is, else JPEG."""
    kind, buffer = "PNG" if picture.width <= MAX_THUMB_PX else "JPEG", io.BytesIO()
    picture.thumbnail((MAX_THUMB_PX, 4 * MAX_THUMB_PX), Image.Resampling.LANCZOS)
    picture.save(buffer, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_grid(results, pictures):
    """Return a block of pictures per prompt; pictures: {(row name, index): PIL}, index < results["shown"]."""
    lines, blocks = {}, []
    for row in results["rows"]:
        lines.setdefault(series(row), []).append(row)
    for index in range(results["shown"]):
        prompt, body = results["prompts"][index % len(results["prompts"])], []
        for label, rows in lines.items():
            body.append(f"<tr><th>{html.escape(label)}</th>")
            for row in rows:
                alt = html.escape(f"{prompt}: {label}, {row['steps']} steps", quote=True)
                picture = f'<img alt="{alt}" src="{data_uri(pictures[row["name"], index])}">'
                body.append(f"<td>{picture}<small>{row['steps']} steps</small></td>")
            body.append("</tr>")
        table = f'<div class="wide"><table class="pictures">{"".join(body)}</table></div>'
        blocks.append(f"<h3>{html.escape(prompt)}</h3>{table}")
    return "".join(blocks)


def html_report(results, pictures):
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in results["notes"])
    title = html.escape(f"{results['settings']['teacher']}: few-step samplers compared")
    head, body, floor = summary(results)
    points = [(name, point) for name, curve in results["bias"].items() for point in curve]
    bias = [[name, str(point["pictures"]), number(point["distance"])] for name, point in points]
    settings = [[key, str(value)] for key, value in results["settings"].items()]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>
<body><h1>{title}</h1>
{html_table(head, body)}<p>{html.escape(floor)}</p>
<h2>How to read the figures</h2><ul>{notes}</ul>
<h2>Figures</h2>{html_table(*full_table(results))}
<h2>Quality over steps and over time</h2>{plots(results)}
<h2>Pictures, the same noise in each column</h2>{picture_grid(results, pictures)}
<h2>What small samples add to the Fréchet distance</h2>
{html_table(["features", "pictures", "Fréchet distance of two draws of the teacher"], bias)}
<h2>Settings</h2>{html_table(["setting", "value"], settings)}
</body></html>
"""
