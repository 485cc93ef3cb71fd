#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Prove that what the two training scripts share is the same, byte for byte.

    python scripts/dev/check_shared.py
    python scripts/dev/check_shared.py --copy_from train_lcm_lora_sd15.py    # bring the other script up to date

A shared region lies between `# >>> shared: NAME` and `# <<< shared: NAME`, both at the start of a line. Both
scripts hold the same regions in the same order; outside of them no function, class or constant may be defined
in both, unless DIFFERENT_FOR_A_REASON says why. Exit codes: 0 the same, 1 not (what and where is printed).
"""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

SCRIPTS = ("train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py")
DIFFERENT_FOR_A_REASON = {
    "SCRIPT_VERSION": "a script travels alone",
    "FAMILY": "names the models",
    "OTHER_SCRIPT": "names the twin",
    "DEFAULT_RESOLUTION_PX": "the models' own size",
    "DEFAULT_W_MIN": "the released recipes differ",
    "CARD_TAGS": "names the models",
    "load_pipeline": "another pipeline class; SDXL's VAE overflows in float16",
    "check_family": "each refuses the other's teachers",
    "FLAGS_WITHOUT_EFFECT": "SD 1.5 has no size and crop conditioning",
    "size_and_crop": "SDXL alone is conditioned on them",
    "encode_ids": "one text encoder, or two and pooled embeddings",
    "unet_inputs": "SDXL's UNet is told of size and crop",
    "kohya_model": "names the models",
    "kohya_name": "kohya's files name SDXL's modules otherwise",
    "TEXT_PARTS": "one text encoder or two",
    "ARGS": "the flags, read before the heavy imports",
    "EXIT_CODE": "of the script when it is run",
}


class Difference(Exception):
    """The scripts are not what they should be; the message says where."""


def split_regions(path):
    """Return {region: text with its markers, "" for the lines outside} of a script, in its order."""
    regions, outside, name = {}, [], None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        marker = re.match(r"# (>>>|<<<) shared: (.+)\n", line)
        if marker is None and re.match(r"\W*(>>>|<<<)\s*shared", line):
            raise Difference(f"{path.name}:{number}: malformed marker {line.strip()!r}")
        if marker and marker[1] == ">>>":
            if name:
                raise Difference(f"{path.name}:{number}: region {marker[2]!r} opens inside {name!r}")
            if marker[2] in regions:
                raise Difference(f"{path.name}:{number}: region {marker[2]!r} is there twice")
            name = marker[2]
            regions[name] = ""
        elif marker and marker[2] != name:
            raise Difference(f"{path.name}:{number}: region {marker[2]!r} closes, open is {name!r}")
        if name:
            regions[name] += line
        outside.append("\n" if name else line)  # line numbers stay what they are
        if marker and marker[1] == "<<<":
            name = None
    if name:
        raise Difference(f"{path.name}: region {name!r} is never closed")
    return regions | {"": "".join(outside)}


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
    """Return every difference between two scripts, as text that names the place."""
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
    for name in sorted(both - DIFFERENT_FOR_A_REASON.keys()):
        found.append(
            f"{name!r} is defined in both scripts outside a region ({first.name}:{outside_a[name]}, "
            f"{second.name}:{outside_b[name]}); share it, or say in DIFFERENT_FOR_A_REASON why not"
        )
    for name in sorted(DIFFERENT_FOR_A_REASON.keys() - both):
        found.append(f"{name!r} of DIFFERENT_FOR_A_REASON is not defined in both scripts: remove it there")
    return found


def copy_regions(source, target):
    """Write the source's regions over the target's."""
    regions, text = split_regions(source), target.read_text(encoding="utf-8")
    for name, old in split_regions(target).items():
        if name and name in regions:
            text = text.replace(old, regions[name])
    target.write_text(text, encoding="utf-8")


def main():
    """Compare the scripts; the exit code says whether they agree."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2], help="where the scripts are")
    cli.add_argument("--copy_from", choices=SCRIPTS, help="first copy this script's regions to the other")
    args = cli.parse_args()
    first, second = (args.folder / name for name in SCRIPTS)
    try:
        if args.copy_from:
            copy_regions(*((first, second) if args.copy_from == SCRIPTS[0] else (second, first)))
        found = compare(first, second)
    except Difference as error:
        found = [str(error)]
    print("\n".join(found) or "the shared regions are the same", file=sys.stderr if found else sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
