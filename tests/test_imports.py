"""Imports run downward only: the architecture as a test."""

import ast
from pathlib import Path

import pytest

import gbnzoo

PACKAGE = Path(gbnzoo.__file__).parent
MAY_IMPORT = {
    "kernels": set(),
    "spanning": set(),
    "norm": {"kernels", "spanning"},
    "regime": set(),
    "data": {"kernels"},
    "image_files": {"data", "recipe"},
    "diffusion": set(),
    "random_walk": set(),
    "distance_plot": set(),
    "walk_law": {"charts", "diffusion", "distance_plot", "random_walk", "records"},
    "metrics": set(),
    "diagnostics": set(),
    "weights": set(),
    "pretrained": {"weights"},
    "models": {"norm", "pretrained"},
    "fusion": {"models", "norm"},
    "recipe": {"regime"},
    "run": {"recipe"},
    "launch": {"run"},
    "graphs": {"run"},
    "jobs": {"launch", "run"},
    "tuning": {"data", "launch", "recipe", "regime"},
    "trainer": {
        "graphs",
        "image_files",
        "launch",
        "models",
        "recipe",
        "data",
        "metrics",
        "run",
        "tuning",
        "norm",
        "fusion",
    },
    "rates": {"allocator", "launch", "recipe", "trainer"},
    "allocator": set(),
    "train": {"allocator", "trainer", "launch", "recipe"},
    "paper": {"recipe"},
    "card": {"paper", "recipe", "run", "regime", "weights"},
    "records": {"card", "recipe", "regime", "run"},
    "charts": {"card", "diffusion", "records", "regime"},
    "page": {"charts"},
    "readmes": {"card", "charts", "report"},
    "collection": {"card", "recipe", "weights"},
    "publish": {"models", "recipe", "run", "card", "collection", "pretrained", "weights"},
    "upload": {"card", "pretrained", "recipe", "weights"},
    "report": {"card", "charts", "diffusion", "page", "recipe", "records", "regime", "run"},
    "watch": {"run"},
    "subject": {"data", "image_files", "models", "pretrained", "publish", "recipe", "run", "trainer", "weights"},
    "diagnose": {"card", "data", "diagnostics", "image_files", "norm", "pretrained", "publish"}
    | {"recipe", "run", "subject", "trainer", "weights"},
    "cli": {
        "diagnose",
        "walk_law",
        "random_walk",
        "watch",
        "card",
        "readmes",
        "report",
        "train",
        "data",
        "metrics",
        "publish",
        "upload",
        "recipe",
        "regime",
        "tuning",
        "jobs",
        "launch",
        "rates",
    },
    "__init__": {"fusion", "norm", "models"},
    "__main__": {"cli"},
}
WITHOUT_TORCH = {"regime", "recipe", "paper", "card"}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            # `from gbnzoo import report` names the module in its tail.
            if node.module == "gbnzoo":
                yield from (f"gbnzoo.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_what_lies_below_it(file):
    module = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imported(file) if name.startswith("gbnzoo.")}
    assert ours <= MAY_IMPORT[module] | {module}


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_arithmetic_and_text_need_no_torch(module):
    assert not {"torch", "timm"} & {name.split(".")[0] for name in imported(PACKAGE / f"{module}.py")}


def test_regime_is_the_standard_library_alone():
    assert {name.split(".")[0] for name in imported(PACKAGE / "regime.py")} <= {
        "math",
        "collections",
        "dataclasses",
        "fractions",
        "typing",
    }
