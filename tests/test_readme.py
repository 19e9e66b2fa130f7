"""The README's and the details' claims that can be checked by machine."""

import ast
import contextlib
import functools
import importlib
import io
import json
import re
from unittest import mock

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DETAILS = (ROOT / ".github" / "details.md").read_text(encoding="utf-8")
TABLE = [line for line in (README + DETAILS).splitlines()
         if line.startswith("|") and ".py`: `" in line]
SCRIPTS = ("model.py", "losses.py", "data.py", "train.py", "retrieve.py", "icl_ground.py",
           "metrics.py")


def symbols():
    """(file, symbol) pairs of the paper-to-code tables."""
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
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
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
    uses, reached = definitions(), set()
    todo = ["main", "report", "ground", "describe"]            # the last three: of the Python lines
    while todo:
        name = todo.pop()
        if name in uses and name not in reached:
            reached.add(name)
            todo += uses[name]
    named = {symbol.split(".")[-1] for _, symbol in symbols()}
    assert named <= reached, named - reached


@pytest.mark.parametrize("equation, function", [
    ("Eq. 1", "sigmoid_loss"), ("Eq. 2", "captioning_loss"),
    ("Eq. 3", "grounding_loss"), ("after Eq. 3", "dense_captioning_loss")])
def test_every_objective_carries_its_equation(equation, function):
    """Guards: an equation that a reader cannot find in the code."""
    assert equation.lower() in getattr(importlib.import_module("losses"), function).__doc__.lower()
    assert any(equation in line and f"`{function}`" in line for line in TABLE)


@functools.cache
def help_of(script, command=None):
    """What a script's --help prints; command: check of data.py, ..."""
    argv = [script, *([command] if command else []), "--help"]
    with (mock.patch("sys.argv", argv), contextlib.redirect_stdout(io.StringIO()) as text,
          contextlib.suppress(SystemExit)):
        importlib.import_module(script.removesuffix(".py").replace("tests/", "")).main()
    return text.getvalue()


@pytest.mark.parametrize("script", [name for name in SCRIPTS
                                    if name not in ("model.py", "losses.py")])
def test_every_flag_is_explained(script):
    """Guards: a --help that lists a flag without a word about it."""
    text = help_of(script)
    assert "usage:" in text and "Traceback" not in text
    explained = re.findall(r"^  (--[a-z-]+)(.*(?:\n {6,}.*)*)", text, re.M)
    assert all(len(words.split()) > 2 for flag, words in explained), text


def code_blocks(language):
    """The fenced blocks of a language in both files."""
    return re.findall(rf"^```{language}\n(.*?)^```", README + DETAILS, re.M | re.S)


def test_commands_name_scripts_and_flags_that_exist():
    """Guards: a command in the README that the parser refuses."""
    commands = re.findall(r"python ((?:tests/)?\w+\.py)([^#\n`]*)", "\n".join(code_blocks("bash"))
                          + "\n".join(re.findall(r"`(python [^`]+)`", README + DETAILS)))
    assert len(commands) >= 12
    for script, rest in commands:
        assert (ROOT / script).exists()
        text = help_of(script, rest.split()[0] if script == "data.py" else None)
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in text, f"{script} has no {flag}"


def test_the_reading_order_is_true():
    """Guards: line counts and sections of "Read in this order" that were true once."""
    order = re.findall(r"^\d\. `(\w+\.py)` \((\d+) lines(?:, the method (\d+))?\)", README, re.M)
    assert sorted(name for name, *_ in order) == sorted(SCRIPTS)
    for name, n_lines, n_method in order:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert abs(len(lines) - int(n_lines)) <= 5, (name, len(lines))
        if n_method:
            ruler = next(i for i, line in enumerate(lines) if line.startswith("# ====="))
            assert abs(ruler - int(n_method)) <= 5, (name, ruler)


def row(start, text):
    """The decimal numbers of the line that begins so."""
    return [float(v) for v in re.findall(r"\d+\.\d+", re.search(rf"^{start}.*$", text, re.M)[0])]


def test_the_figures_are_those_of_one_run():
    """Guards: a run measured again whose figures were changed in one of their places only."""
    printed, results = README.split("## Install")[1], README.split("## Results")[1]
    i2t, t2i = (row("LoFi", printed.split(way)[1]) for way in ("Image-to-Text", "Text-to-Image"))
    grounding, prior = (row(name, printed.split("Ro/S  F@0.5")[1]) for name in ("LoFi", "phrase"))
    for name, values in ((r"\| image-to-text", i2t[:3:2]), (r"\| text-to-image", t2i[:3:2]),
                         (r"\| Ro/L", grounding[:2] + prior[:2]),
                         (r"\| F@0.5, LoFi", [grounding[2], prior[2]])):
        found = row(name, results)
        assert all(value in found for value in values), (name, values, found)


def test_the_means_are_of_the_seeds():
    """Guards: a seed measured again, and the mean left as it was."""
    seeds = DETAILS.split("## Results by seed")[1]
    runs = [row(rf"\| {seed} \|", seeds) for seed in (0, 1, 2)]
    means = row(r"\| mean \|", seeds)
    assert means == [pytest.approx(sum(column) / 3, abs=0.051) for column in zip(*runs)]


def test_the_config_of_the_readme_is_the_papers():
    """Guards: a shape in the diagram that is not the model's."""
    from model import PAPER
    shape = f"(B, {(PAPER.vision['image_size'] // PAPER.vision['patch_size']) ** 2}, "
    assert shape + f"{PAPER.vision['hidden_size']})" in README
    assert f"(B, {PAPER.n_queries}, {PAPER.decoder['hidden_size']})" in README
    assert json.loads(code_blocks("json")[0])["split"] == "train"


def test_the_readme_is_short():
    """Guards: a README that grows back, lines that wrap, blocks without a language."""
    lines, fenced = README.splitlines(), False
    assert len(lines) <= 160
    for line in lines:
        fenced ^= line.startswith("```")
        assert len(line) <= 120 or line.startswith("|") or fenced, line
    assert "Python 3.11" in README


def test_the_pictures_and_links_are_there():
    """Guards: a README with a broken picture or link."""
    for text, folder in ((README, ROOT), (DETAILS, ROOT / ".github")):
        for place in re.findall(r"\]\(([^)]+)\)", text):
            assert place.startswith("http") or (folder / place).exists(), place


def test_requirements_are_the_seven_pinned():
    """Guards: an eighth dependency, or a version that floats."""
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(line.split("==")[0] for line in lines) == sorted(
        ["torch", "transformers", "peft", "numpy", "pillow", "tqdm", "pytest"])
    assert all("==" in line for line in lines)
