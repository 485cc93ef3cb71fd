#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Prove that what the two training scripts share is the same, byte for byte.

    python scripts/dev/check_shared.py
    python scripts/dev/check_shared.py --copy_from train_lcm_lora_sd15.py    # bring the other script up to date

A shared region lies between `# >>> shared: NAME` and `# <<< shared: NAME`, both at the start of a line. Both
scripts hold the same regions in the same order; outside of them no function, class or constant may be defined
in both, unless DIFFERENT_FOR_A_REASON names it. Exit codes: 0 the same, 1 not (what and where is printed).
"""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

SCRIPTS = ("train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py")
# The models' names and own values; pipelines and their conditioning; keys of kohya's files; a script travels alone.
DIFFERENT_FOR_A_REASON = set(
    "FAMILY OTHER_SCRIPT DEFAULT_RESOLUTION_PX DEFAULT_W_MIN CARD_TAGS FLAGS_WITHOUT_EFFECT TEXT_PARTS CACHED_TENSORS "
    "VAE_SCALING USUAL_VAE load_pipeline check_family size_and_crop encode_ids unet_inputs kohya_model kohya_name "
    "SCRIPT_VERSION ARGS EXIT_CODE".split()
)
REGION = re.compile(r"^# >>> shared: (\w+)\n(.*?)^# <<< shared: \1\n", re.M | re.S)


def split_regions(path):
    """Return {region: text with its markers, "" for the lines outside} of a script, in its order."""
    text = path.read_text(encoding="utf-8")
    found = list(REGION.finditer(text))
    outside = REGION.sub(lambda region: "\n" * region[0].count("\n"), text)  # line numbers stay what they are
    if wrong := re.search(r"^[^\w\n]*(>>>|<<<)\s*shared.*", "".join(region[2] for region in found) + outside, re.M):
        sys.exit(f"{path.name}: {wrong[0].strip()!r} is malformed, has no partner, or lies in a region")
    regions = {region[1]: region[0] for region in found}
    if len(regions) < len(found):
        sys.exit(f"{path.name}: a region is there twice")
    return regions | {"": outside}


def names_outside(text):
    """Return {name: line number} of what a script defines at top level outside of its regions."""
    found = {}
    body = ast.parse(text).body
    for node in [*body, *(inner for block in body if isinstance(block, ast.If) for inner in block.body)]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = (name for name in ast.walk(node) if isinstance(name, ast.Name))
            found |= {name.id: node.lineno for name in names if isinstance(name.ctx, ast.Store)}
    return found


def compare(first, second):
    a, b = split_regions(first), split_regions(second)
    outside_a, outside_b = names_outside(a.pop("")), names_outside(b.pop(""))
    if list(a) != list(b):
        return [f"regions differ: {first.name} has {', '.join(a)}; {second.name} has {', '.join(b)}"]
    found = []
    for name in a:
        sides = (a[name].splitlines(), b[name].splitlines())
        diff = difflib.unified_diff(*sides, first.name, second.name, n=1, lineterm="")
        if a[name] != b[name]:
            found.append("\n".join([f"region {name!r} differs:", *diff]))
    both = outside_a.keys() & outside_b.keys()
    for name in sorted(both - DIFFERENT_FOR_A_REASON):
        found.append(
            f"{name!r} is defined in both scripts outside a region ({first.name}:{outside_a[name]}, "
            f"{second.name}:{outside_b[name]}); share it, or name it in DIFFERENT_FOR_A_REASON"
        )
    for name in sorted(DIFFERENT_FOR_A_REASON - both):
        found.append(f"{name!r} of DIFFERENT_FOR_A_REASON is not defined in both scripts: remove it there")
    return found


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2], help="where the scripts are")
    cli.add_argument("--copy_from", choices=SCRIPTS, help="first copy this script's regions to the other")
    args = cli.parse_args()
    first, second = (args.folder / name for name in SCRIPTS)
    if args.copy_from:
        source, target = (first, second) if args.copy_from == SCRIPTS[0] else (second, first)
        regions, text = split_regions(source), target.read_text(encoding="utf-8")
        target.write_text(REGION.sub(lambda region: regions.get(region[1], region[0]), text), encoding="utf-8")
    found = compare(first, second)
    print("\n".join(found) or "the shared regions are the same", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
