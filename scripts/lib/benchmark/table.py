# SPDX-License-Identifier: Apache-2.0
"""Tables of `benchmark.py train --all`, and their places in README.md and docs/performance.md."""

import json
import re
import sys
from pathlib import Path

from lib import write_whole

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
    return (figures or {"failed": "–"}).get("failed") or f"{figures[name]:.{digits}f}"


def ratio(row, name):
    pair = [row.get(recipe) or {} for recipe in ("ours", "reference")]
    return f"{pair[0][name] / pair[1][name]:.2f}" if all(name in each for each in pair) else "–"


def settings(row):
    side = 64 if row["tiny"] else RESOLUTIONS[row["model"]]
    options = ", ".join(row["options"]) or "–"
    return TITLES_OF_MODELS[row["model"]], f"{side} px x {row['batch']}", row["precision"], options


def markdown(report, columns, rows):
    machine, tiny = report["machine"], any(row["tiny"] for row in report["rows"])
    kind = "the demo teachers at 64 px in bf16: a trial of the command" if tiny else "random weights"
    lines = "".join(f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *rows])
    return f"Measured on {machine.get('device')}, torch {machine.get('torch')}, {kind}.\n\n{lines}"


# Title, whether README.md has the column too, text of a row.
COLUMNS = (
    ("samples/s", True, lambda row: figure_text(row.get("ours"), "samples_per_second", 2)),
    ("plain recipe", False, lambda row: figure_text(row.get("reference"), "samples_per_second", 2)),
    ("times its speed", True, lambda row: ratio(row, "samples_per_second")),
    ("GiB allocated", False, lambda row: figure_text(row.get("ours"), "allocated_gib", 2)),
    ("GiB reserved", True, lambda row: figure_text(row.get("ours"), "reserved_gib", 2)),
    ("GiB estimated", False, lambda row: f"{row['estimated_gib']:.2f}" if row.get("estimated_gib") else "–"),
    ("plain recipe's GiB", False, lambda row: figure_text(row.get("reference"), "allocated_gib", 2)),
    ("of the plain recipe's memory", True, lambda row: ratio(row, "allocated_gib")),
    ("share of matmul rate", False, lambda row: figure_text(row.get("ours"), "share_of_matmul_rate", 3)),
)


def gpu_table(report, is_short=False):
    """Return the rows of a report; the short table has the first of each model and batch, and fewer columns."""
    columns, seen, rows = [each for each in COLUMNS if each[1] or not is_short], set(), []
    for row in report["rows"]:
        size = row["model"], row["batch"]
        if not is_short or size not in seen:
            rows.append([*settings(row), *(text(row) for _, _, text in columns)])
        seen.add(size)
    return markdown(report, ["model", "pictures", "precision", "flags", *(title for title, *_ in columns)], rows)


def write_tables(figures, root=ROOT):
    """Write the tables between their markers; the exit code is 2 where a file has no markers."""
    tables = {"short": f"{NOT_MEASURED}\n", "full": f"{NOT_MEASURED}\n"}
    if figures:
        try:
            report = json.loads(figures.read_text(encoding="utf-8"))
            tables = {"short": gpu_table(report, is_short=True), "full": gpu_table(report)}
        except (ValueError, LookupError, TypeError, AttributeError):
            report = {"rows": []}
        if not report["rows"]:
            print(f"error: {figures}: holds no rows of `train --all`; measure again", file=sys.stderr)
            return 2
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
