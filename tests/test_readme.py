"""The README's claims that can be checked by machine."""

import ast
import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys
from unittest import mock

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
SECTION = README.split("## Paper to code")[1].split("\n## ")[0]
TABLE = [line for line in SECTION.splitlines() if line.startswith("|") and "`" in line]


def symbols():
    """(file, symbol) pairs of the paper-to-code table."""
    for line in TABLE:
        file = None
        for word in re.findall(r"`([^`]+)`", line):
            if word.endswith(".py"):
                file = word
            else:
                yield file, word


@pytest.mark.parametrize("file, symbol", list(symbols()))
def test_every_symbol_of_the_table_exists(file, symbol):
    """Guards: a table that names what was renamed or removed."""
    thing = importlib.import_module(file.removesuffix(".py"))
    for part in symbol.split("."):
        thing = getattr(thing, part)


def definitions():
    """{name: names that its definition uses} of every function, method, class and constant."""
    uses = {}
    for script in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own = [node.name]
            elif isinstance(node, ast.Assign):
                own = [target.id for target in node.targets if isinstance(target, ast.Name)]
            else:
                continue
            inner = list(ast.walk(node))
            if isinstance(node, ast.ClassDef):                 # a method counts when it is called
                inner = [n for part in node.body if not isinstance(part, ast.FunctionDef)
                         or part.name.startswith("__") or part.name == "forward"
                         for n in ast.walk(part)]
            used = {n.id for n in inner if isinstance(n, ast.Name)} | {
                n.attr for n in inner if isinstance(n, ast.Attribute)}
            for name in own:
                uses[name] = uses.get(name, set()) | used - {name}
    return uses


def test_every_symbol_of_the_table_is_reached_from_a_main():
    """Guards: a function in the table that only tests call, next to the one that runs."""
    uses, reached, todo = definitions(), set(), ["main"]
    while todo:
        name = todo.pop()
        if name in uses and name not in reached:
            reached.add(name)
            todo += uses[name]
    named = {symbol.split(".")[-1] for _, symbol in symbols()}
    assert named <= reached | {"main"}, named - reached


@pytest.mark.parametrize("equation, function", [
    ("Eq. 1", "sigmoid_loss"), ("Eq. 2", "captioning_loss"),
    ("Eq. 3", "grounding_loss"), ("after Eq. 3", "dense_captioning_loss")])
def test_every_objective_carries_its_equation(equation, function):
    """Guards: an equation that a reader cannot find in the code."""
    assert equation.lower() in getattr(importlib.import_module("losses"), function).__doc__.lower()
    assert any(equation in line and f"`{function}`" in line for line in TABLE)


@functools.cache
def help_of(script, command):
    """What a script's --help prints; command: export of model.py, check of data.py, ..."""
    argv = [script, *([command] if command else []), "--help"]
    with (mock.patch("sys.argv", argv), contextlib.redirect_stdout(io.StringIO()) as text,
          contextlib.suppress(SystemExit)):
        importlib.import_module(script.removesuffix(".py").replace("tests/", "")).main()
    return text.getvalue()


@pytest.mark.parametrize("flag, code", [("--help", 0), ("--no-such-flag", 2)])
@pytest.mark.parametrize("script", ["train.py", "retrieve.py", "icl_ground.py", "metrics.py",
                                    "model.py", "data.py"])
def test_help_and_a_wrong_flag_answer_before_the_slow_imports(script, flag, code):
    """Guards: seconds of importing torch and transformers before a usage error."""
    ends = ("import runpy, sys\n"
            f"sys.argv = [{script!r}, {flag!r}]\n"
            f"try: runpy.run_path({script!r}, run_name='__main__')\n"
            "except SystemExit as end: print(end.code or 0, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", ends], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{code} False", done.stdout + done.stderr


def test_commands_name_scripts_and_flags_that_exist():
    """Guards: a command in the README that the parser refuses."""
    commands = re.findall(r"^    (?:.*&& )?python (\S+\.py)(.*)$", README, re.M)
    assert len(commands) >= 6
    for script, rest in commands:
        assert (ROOT / script).exists()
        text = help_of(script, rest.split()[0] if script in ("data.py", "model.py") else None)
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in text, f"{script} has no {flag}"


def test_figures_agree():
    """Guards: a run measured again whose figures were changed in one of their places: the printed
    run is the first of the three seeds, and the means are theirs."""
    def row(start, text=README):
        line = re.search(rf"^ *{start}.*$", text, re.M)[0]
        return [float(value) for value in re.findall(r"\d+\.\d+", line)]
    printed = README.split("## Two commands")[1].split("## The seven files")[0]
    results = README.split("## Results")[1]
    i2t, t2i = (row("LoFi", printed.split(way)[1]) for way in ("Image-to-Text", "Text-to-Image"))
    grounding, prior = (row(name, printed.split("grounding of")[1])
                        for name in ("LoFi", "phrase prior"))
    for name, first in ((r"\| image-to-text R@1, R@10", (i2t[0], i2t[2])),
                        (r"\| text-to-image R@1, R@10", (t2i[0], t2i[2])),
                        (r"\| Ro/S", grounding[1:2]), (r"\| F@0.5, LoFi", grounding[2:3])):
        cells = re.search(rf"^{name}.*$", results, re.M)[0].split("|")[3]
        found = re.findall(r"([\d.]+) \(([^)]*)\)", cells)
        for value, (mean, seeds) in zip(first, found, strict=True):
            seeds = [float(seed) for seed in seeds.split(", ")]
            assert len(seeds) == 3 and seeds[0] == value
            assert float(mean) == pytest.approx(sum(seeds) / 3, abs=0.051)
    assert f"phrase prior {prior[2]:.2f}" in results and f"phrase prior {prior[1]:.2f}" in results


def test_the_picture_is_there():
    """Guards: a README with a broken picture."""
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).exists()


def test_requirements_are_the_seven_pinned():
    """Guards: an eighth dependency, or a version that floats."""
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(line.split("==")[0] for line in lines) == sorted(
        ["torch", "transformers", "peft", "numpy", "pillow", "tqdm", "pytest"])
    assert all("==" in line for line in lines)
