"""What the project says of itself agrees, and what is installed is what a checkout has, less the weights."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gbnzoo
from gbnzoo.kernels import cpu

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    pinned = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    return {canonicalize_name(each.name): Version(str(each.specifier).removeprefix("==")) for each in pinned}


def requirements() -> dict[str, Requirement]:
    """What pyproject.toml asks for by name, extras included."""
    asked = map(Requirement, chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))
    parsed = {canonicalize_name(each.name): each for each in asked}
    del parsed["gbnzoo"]  # its own extra, inside another one
    return parsed


def test_the_citation_and_the_changelog_name_this_version():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert cited == latest == gbnzoo.__version__


def test_lowest_txt_pins_each_requirement_at_its_lower_bound():
    lowest = pins("lowest.txt")
    bounds = {name: Version(str(each.specifier).removeprefix(">=")) for name, each in requirements().items()}
    assert lowest == bounds


def test_ci_installs_versions_that_are_asked_for():
    installed = pins("constraints.txt")
    assert all(each.specifier.contains(installed[name]) for name, each in requirements().items())


def test_every_folder_with_code_is_packaged():
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "gbnzoo").rglob("*.py")}
    assert folders <= set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_classifiers_name_every_python_that_ruff_and_the_project_start_from():
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language")]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + versions[0].replace(".", "")


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[set[str], Path]:
    """Files in the source archive, and the wheel built from that archive alone, without a compiler."""
    checkout, out = (tmp_path_factory.mktemp(name) for name in ("checkout", "out"))
    leave = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for name in ("gbnzoo", "recipes", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=leave)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, checkout)
    weights = checkout / "hub" / "mlp5_gbn.planted" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (checkout / "gbnzoo" / "models" / "planted.safetensors").touch()

    def build(what: str, source: Path) -> None:
        code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
        without_compiler = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=source, env=without_compiler, check=True, stdout=subprocess.DEVNULL)

    build("sdist", checkout)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which 3.11.3 and older have not
        archive.extractall(out)
    source = out / f"gbnzoo-{gbnzoo.__version__}"
    build("wheel", source)
    return {f.relative_to(source).as_posix() for f in source.rglob("*") if f.is_file()}, next(out.glob("*.whl"))


def test_archives_hold_code_recipes_and_lists_but_no_weights(archives):
    source, wheel = archives[0], set(zipfile.ZipFile(archives[1]).namelist())
    code = {f.relative_to(ROOT).as_posix() for f in (ROOT / "gbnzoo").rglob("*.py")}
    recipes = {f.relative_to(ROOT).as_posix() for f in (ROOT / "recipes").rglob("*.*")}
    kernels = {f"gbnzoo/kernels/{name}" for name in cpu._SOURCES}
    assert code | kernels | {"gbnzoo/models/batchnorm_models.csv", "gbnzoo/page.html"} <= source & wheel
    assert recipes | {"evaluate.py", "tests/conftest.py", "LICENSE"} <= source
    assert {f"gbnzoo/{name}" for name in recipes} <= wheel
    assert not [name for name in source | wheel if name.endswith((".safetensors", ".so", ".png"))]
    assert not [name for name in wheel if name.startswith(("tests", "hub", "recipes"))]


def test_an_installed_gbnzoo_finds_its_recipes_by_the_path_of_a_checkout(archives, tmp_path):
    zipfile.ZipFile(archives[1]).extractall(tmp_path / "installed")
    command = "from gbnzoo.cli import app; app(['plan', 'recipes/digits/resnet8_thin_gbn.yaml'])"
    planned = subprocess.run(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert planned.stdout.startswith("recipes/digits/resnet8_thin_gbn.yaml: resnet8_thin_gbn on digits")
