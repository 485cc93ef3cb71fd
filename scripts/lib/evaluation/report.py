# SPDX-License-Identifier: Apache-2.0
"""The Markdown table and the HTML report of results: one file, no script, no request to the network."""

import base64
import html
import io
import math
import re
from itertools import product

from PIL import Image

from lib.pipelines import make_grid

MAX_THUMB_PX = 192
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 0 1rem 3rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; }
td { white-space: nowrap; } th { vertical-align: bottom; min-width: 4rem; } thead th { background: var(--soft); }
td small { opacity: 0.7; display: block; } .plots { width: 100%; height: auto; background: white; }
"""


def number(value, digits=3):
    """Return a figure with some significant digits, thousands in full; "–" for None."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def with_interval(figure):
    if not figure or figure["low"] is None:
        return number(figure and figure["value"])
    return f"{number(figure['value'])} [{number(figure['low'], 4)}, {number(figure['high'], 4)}]"


def columns(results):
    """Return the figures that any row has, in the order of results["figures"]: {key: title}."""
    used = set().union(*(row["figures"] for row in results["rows"]))
    return {key: title for key, title in results["figures"].items() if key in used}


def full_table(results):
    titles, body = columns(results), []
    for row in results["rows"]:
        figures = [with_interval(row["figures"].get(key)) for key in titles]
        body.append([row["label"], str(row["steps"]), f"{row['guidance']:g}", *figures, f"{row['evaluations']:g}"])
    return ["sampler", "steps", "guidance", *titles.values(), "UNet evaluations a picture"], body


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
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def html_table(head, body):
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in body)
    rows = re.sub(r" (\[[^\]<]*\])</td>", r"<small>\1</small></td>", rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'


def series(row):
    return f"{row['label']}, guidance {row['guidance']:g}"


def plots(results):
    """Return one picture, a row of plots for each figure but the seconds: over steps, and over seconds a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>Plots need matplotlib: pip install -r scripts/requirements-eval.txt</p>"
    lines = {}
    for row in results["rows"]:
        lines.setdefault(series(row), []).append(row)
    titles = [(key, title) for key, title in columns(results).items() if key != "seconds"]
    drawing, drawn = Figure((10, 4 * len(titles)), layout="constrained"), io.BytesIO()
    grid = drawing.subplots(len(titles), 2, squeeze=False)
    for (key, title), axes in zip(titles, grid, strict=True):
        for label, rows in lines.items():
            places = [(row["steps"], row["figures"]["seconds"]["value"]) for row in rows if row["figures"].get(key)]
            figures = [row["figures"][key] for row in rows if row["figures"].get(key)]
            halves = [0 if figure["low"] is None else figure["high"] - figure["value"] for figure in figures]
            for ax, x in zip(axes, zip(*places, strict=True), strict=False):  # no place where there is no figure
                ax.errorbar(x, [figure["value"] for figure in figures], halves, marker="o", capsize=2, label=label)
        for ax, x_title in zip(axes, ("steps", "seconds a picture"), strict=True):
            ax.set(title=title, xlabel=x_title, xscale="log", yscale="log" if key.startswith("FD") else "linear")
    drawing.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    drawing.savefig(drawn, format="svg")
    image = base64.b64encode(drawn.getvalue()).decode()
    return f'<img class="plots" alt="plots of the table" src="data:image/svg+xml;base64,{image}">'


def picture_grid(results, pictures):
    """Return sample.py's grid of pictures, {(row name, index): PIL}, as a data URI."""
    if not results["shown"]:
        return ""
    cells, labels = {}, {series(row): series(row).replace(", ", "\n") for row in results["rows"]}
    for row, index in product(results["rows"], range(results["shown"])):
        picture = cells[index, series(row), row["steps"]] = pictures[row["name"], index].copy()
        picture.thumbnail((MAX_THUMB_PX, MAX_THUMB_PX), Image.Resampling.LANCZOS)
    prompts = [results["prompts"][index % len(results["prompts"])] for index in range(results["shown"])]
    steps, buffer = sorted({row["steps"] for row in results["rows"]}), io.BytesIO()
    make_grid(prompts, labels, steps, cells).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<div class="wide"><img alt="{html.escape("; ".join(prompts), quote=True)}" src="{uri}"></div>'


def html_report(results, pictures):
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in results["notes"])
    title = html.escape(f"{results['settings']['teacher']}: few-step samplers compared")
    head, body, floor = summary(results)
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
<h2>Settings</h2>{html_table(["setting", "value"], settings)}
</body></html>
"""
