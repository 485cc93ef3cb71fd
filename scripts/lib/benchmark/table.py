# SPDX-License-Identifier: Apache-2.0
"""Tables of `benchmark.py train --all`, and their places in README.md and docs/performance.md."""

import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PLACE = re.compile(r"(<!-- gpu table: (short|full) -->\n).*?(<!-- end of gpu table -->)", re.DOTALL)
NOT_MEASURED = (
    "Not measured yet, because no GPU was at hand. `python scripts/benchmark.py train --all --json gpu.json`\n"
    "measures one, and `python scripts/benchmark.py table gpu.json` writes the table here."
)
RESOLUTIONS = {"sd15": 512, "sdxl": 1024}
TITLES_OF_MODELS = {"sd15": "SD 1.5", "sdxl": "SDXL"}


def figure_text(figures, name, digits):
    """Return one figure of a measurement as text: a dash where it was not made, or why it failed."""
    if not figures:
        return "–"
    return figures.get("failed") or f"{figures[name]:.{digits}f}"


def ratio(row, name):
    """Return ours / plain recipe as text."""
    pair = [row.get(recipe) or {} for recipe in ("ours", "reference")]
    return f"{pair[0][name] / pair[1][name]:.2f}" if all(name in each for each in pair) else "–"


def settings(row):
    """Return (model, picture's side and batch, precision, options) of a row as text."""
    side = 64 if row["tiny"] else RESOLUTIONS[row["model"]]
    options = ", ".join(row["options"]) or "–"
    return TITLES_OF_MODELS[row["model"]], f"{side} px x {row['batch']}", row["precision"], options


def markdown(report, columns, rows):
    """Return a table below one sentence that names the machine."""
    machine, tiny = report["machine"], any(row["tiny"] for row in report["rows"])
    kind = "the demo teachers at 64 px in bf16: a trial of the command" if tiny else "random weights"
    lines = "".join(f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *rows])
    return f"Measured on {machine.get('device')}, torch {machine.get('torch')}, {kind}.\n\n{lines}"


def gpu_table(report):
    """Return every row of a report: speed and memory of ours, of the plain recipe, and as estimated."""
    columns = [
        "model", "pictures", "precision", "flags", "samples/s", "plain recipe", "ratio", "GiB allocated",
        "reserved", "estimated", "plain recipe", "ratio", "share of matmul rate",
    ]  # fmt: skip
    rows = []
    for row in report["rows"]:
        ours, plain = row.get("ours"), row.get("reference")
        estimated = row.get("estimated_gib")
        rows.append([
            *settings(row), figure_text(ours, "samples_per_second", 2), figure_text(plain, "samples_per_second", 2),
            ratio(row, "samples_per_second"), figure_text(ours, "allocated_gib", 2),
            figure_text(ours, "reserved_gib", 2),
            f"{estimated:.2f}" if estimated else "–", figure_text(plain, "allocated_gib", 2),
            ratio(row, "allocated_gib"), figure_text(ours, "share_of_matmul_rate", 3),
        ])  # fmt: skip
    return markdown(report, columns, rows)


def first_rows(report):
    """Return the rows without options that a reader compares first: one for each model, batch and precision."""
    seen, rows = set(), []
    for row in report["rows"]:
        name = row["model"], row["batch"]
        if name not in seen:
            seen.add(name)
            rows.append([
                *settings(row), figure_text(row.get("ours"), "reserved_gib", 1),
                figure_text(row.get("ours"), "samples_per_second", 2), ratio(row, "samples_per_second"),
                ratio(row, "allocated_gib"),
            ])  # fmt: skip
    columns = ["model", "pictures", "precision", "flags", "GiB", "samples/s"]
    columns += ["times the plain recipe's speed", "of its memory"]
    return markdown(report, columns, rows)


def write_whole(path, text):
    """Write a text file so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_tables(figures, root=ROOT):
    """Write the tables between their markers; the exit code is 2 where a file has no markers."""
    tables = {"short": f"{NOT_MEASURED}\n", "full": f"{NOT_MEASURED}\n"}
    if figures:
        report = json.loads(figures.read_text(encoding="utf-8"))
        tables = {"short": first_rows(report), "full": gpu_table(report)}
    code = 0
    for path in (root / "README.md", root / "docs" / "performance.md"):
        text = path.read_text(encoding="utf-8")
        changed, places = PLACE.subn(lambda place: place[1] + tables[place[2]] + place[3], text)
        if places:
            write_whole(path, changed)
        else:
            marks = "`<!-- gpu table: short -->` and `<!-- end of gpu table -->`"
            print(f"error: {path}: has no place for the table; add the lines {marks}", file=sys.stderr)
            code = 2
    return code
