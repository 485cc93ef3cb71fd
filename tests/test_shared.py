"""scripts/dev/check_shared.py notices each way in which the two training scripts can drift apart."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, load_script

OPEN, CLOSE = "# >>> shared: training\n", "# <<< shared: training\n"


def replaced(old, new):
    """Return an edit that puts `new` in place of `old`, which has to be there once."""

    def edit(text):
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return edit


def without_markers(text):
    return text.replace(OPEN, "").replace(CLOSE, "")


def swapped(text):
    """Exchange the names of two regions that follow each other."""
    for old, new in (("training\n", "\0"), ("data\n", "training\n"), ("\0", "data\n")):
        for arrow in (">>>", "<<<"):
            text = text.replace(f"# {arrow} shared: {old}", f"# {arrow} shared: {new}")
    return text


# What is changed in the SDXL script alone, and what the message has to name.
IN_ONE = {
    "one byte": (
        replaced("SIGMA_DATA = 0.5", "SIGMA_DATA = 0.6"),
        ["region 'constants' differs", "-SIGMA_DATA = 0.5", "+SIGMA_DATA = 0.6", *SCRIPTS],
    ),
    "a space at a line's end": (replaced(CLOSE, " \n" + CLOSE), ["region 'training' differs"]),
    "a def line": (
        replaced("def draw(args, shape,", "def draw(args, shape=None,"),
        ["region 'training' differs", "+def draw(args, shape=None,"],
    ),
    "a region without its start": (replaced(OPEN, ""), [SCRIPTS[1], "<<< shared: training", "no partner"]),
    "a region without its end": (replaced(CLOSE, ""), [SCRIPTS[1], ">>> shared: training"]),
    "a region without markers": (without_markers, ["regions differ", *SCRIPTS]),
    "regions in another order": (swapped, ["regions differ"]),
    "a region within a region": (
        replaced(CLOSE, "# >>> shared: inner\n# <<< shared: inner\n" + CLOSE), ["shared: inner", "lies in a region"]
    ),
    "a region that is there twice": (replaced(CLOSE, CLOSE + OPEN + CLOSE), ["there twice"]),
    "another region's end": (replaced(CLOSE, "# <<< shared: stop\n"), [">>> shared: training"]),
    "no colon": (replaced(OPEN, "# >>> shared training\n"), ["malformed", "shared training"]),
    "no space": (replaced(OPEN, "#>>> shared: training\n"), ["malformed"]),
    "an indented marker": (replaced(CLOSE, "    " + CLOSE), ["malformed"]),
}  # fmt: skip
# What both scripts define alike outside of a region, and its name.
IN_BOTH = {
    "a function": ("def helper():\n    return 1\n", "helper"),
    "a class": ("class Helper:\n    pass\n", "Helper"),
    "a constant": ("LIMIT = 1\n", "LIMIT"),
    "a constant with its type": ("LIMIT: int = 1\n", "LIMIT"),
    "two constants": ("FIRST, SECOND = 1, 2\n", "SECOND"),
    "in a branch": ("if FAMILY:\n    LIMIT = 1\n", "LIMIT"),
}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Return a function that checks copies of the scripts in tmp_path: (exit code, what it says)."""
    tool = load_script("scripts/dev/check_shared.py")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["check_shared.py", "--folder", str(tmp_path), *flags])
        try:
            code, said = tool.main(), ""
        except SystemExit as stop:  # with a text the exit code is 1
            code, said = 1, str(stop)
        printed = capsys.readouterr()
        return code, printed.out + printed.err + said

    return run


def change(folder, names, edit):
    for name in names:
        text = (folder / name).read_text()
        assert edit(text) != text
        (folder / name).write_text(edit(text))


def test_the_scripts_of_the_repository_agree():
    command = [sys.executable, str(ROOT / "scripts" / "dev" / "check_shared.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and "the same" in done.stdout


@pytest.mark.parametrize("name", IN_ONE)
def test_a_difference_is_named(check, tmp_path, name):
    edit, named = IN_ONE[name]
    change(tmp_path, SCRIPTS[1:], edit)
    code, said = check()
    assert code == 1 and all(text in said for text in named), said


def test_a_copy_outside_of_the_regions_is_named(check, tmp_path):
    whole = {script: (tmp_path / script).read_text() for script in SCRIPTS}
    line = whole[SCRIPTS[1]].partition(CLOSE)[0].count("\n")
    for text, name in IN_BOTH.values():
        change(tmp_path, SCRIPTS, replaced(CLOSE, CLOSE + text))
        code, said = check()
        assert code == 1 and f"{name!r} is defined in both scripts outside a region" in said, said
        assert f"{SCRIPTS[1]}:{line + 2 + text.startswith('if')}" in said
        for script in SCRIPTS:
            (tmp_path / script).write_text(whole[script])


def test_a_region_that_lost_its_markers_in_both_scripts_is_named(check, tmp_path):
    change(tmp_path, SCRIPTS, without_markers)
    code, said = check()
    assert code == 1 and "'training_loss' is defined in both" in said


def test_a_reason_without_its_definition_is_named(check, monkeypatch):
    tool = load_script("scripts/dev/check_shared.py")
    monkeypatch.setattr(tool, "DIFFERENT_FOR_A_REASON", tool.DIFFERENT_FOR_A_REASON | {"gone"})
    code, said = check()
    assert code == 1 and "'gone' of DIFFERENT_FOR_A_REASON" in said


@pytest.mark.parametrize(("name", "target"), list(zip(["one byte", "a space at a line's end"], SCRIPTS, strict=True)))
def test_copying_brings_the_other_script_up_to_date(check, tmp_path, name, target):
    whole = {script: (tmp_path / script).read_bytes() for script in SCRIPTS}
    change(tmp_path, [target], IN_ONE[name][0])
    (source,) = set(SCRIPTS) - {target}
    code, said = check("--copy_from", source)
    assert code == 0, said
    assert {script: (tmp_path / script).read_bytes() for script in SCRIPTS} == whole


def test_copying_does_not_hide_a_missing_region(check, tmp_path):
    change(tmp_path, SCRIPTS[1:], without_markers)
    before = (tmp_path / SCRIPTS[1]).read_bytes()
    code, said = check("--copy_from", SCRIPTS[0])
    assert code == 1 and "regions differ" in said
    assert (tmp_path / SCRIPTS[1]).read_bytes() == before


def test_the_tools_define_no_name_twice():
    places = {}
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                inside = (part for part in ast.walk(node) if isinstance(part, ast.Name))
                names = [part.id for part in inside if isinstance(part.ctx, ast.Store)]
            for name in names:
                places.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    assert not {name: at for name, at in places.items() if len(at) > 1 and name not in ("main", "parse_args")}
