"""The editable install: plain names (`data`, `models`, `kernels`) that a user's own folders must not shadow.

It is built here as pip builds it (setuptools' build_editable), unpacked into a site folder of its own, and used by a
fresh Python that reads no other .pth file: neither this checkout nor an install of it can help the imports along.
"""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import kernels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
MODULES = PROJECT["tool"]["setuptools"]["py-modules"]
NOT_SHIPPED = {"tests", "benchmarks", "experiments", "lessons", "docs", "build", "runs"}


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


def a_copy_of_the_repository(to: Path) -> Path:
    to.mkdir()
    for package in {name.partition(".")[0] for name in PACKAGES}:
        copytree(ROOT / package, to / package, ignore=ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            copy(file, to / file.name)
    return to


def build(hook: str, repository: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Run one hook of the build backend that pyproject.toml names, as pip does in the repository's folder."""
    system = PROJECT["build-system"]
    path = [str((repository / p).resolve()) for p in system.get("backend-path", [])]
    code = (
        f"import sys; sys.path[:0] = {path!r}; import {system['build-backend']} as backend; backend.{hook}({str(to)!r})"
    )
    to.mkdir(exist_ok=True)
    return python("-c", code, cwd=repository)


class Install:
    """A copy of the repository, and a site folder into which it is installed."""

    def __init__(self, folder: Path) -> None:
        self.repository = a_copy_of_the_repository(folder / "repository")
        built = build("build_editable", self.repository, folder / "wheels")
        assert built.returncode == 0, built.stderr
        (self.wheel,) = (folder / "wheels").glob("*.whl")
        self.site = folder / "site"
        zipfile.ZipFile(self.wheel).extractall(self.site)

    def run(self, code: str, *, cwd: Path, site: Path | None = None) -> str:
        """What `python -c code` prints in `cwd`, with this install before the packages of the environment."""
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        start = f"import site, sys; site.addsitedir({str(site or self.site)!r}); sys.path.extend({paths!r})"
        done = python("-S", "-E", "-c", f"{start}\n{code}", cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    return Install(tmp_path_factory.mktemp("install"))


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder with a user's own data/ and models/."""
    for name, file in {"data": "train.jsonl", "models": "weights.bin", "kernels": "notes.txt"}.items():
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / file).touch()
    return tmp_path / "work"


def test_pyproject_lists_the_folders_that_are_packages() -> None:
    top = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in NOT_SHIPPED and not p.name.startswith(".")]
    folders = {init.parent.relative_to(ROOT).as_posix() for folder in top for init in folder.rglob("__init__.py")}
    assert sorted(PACKAGES) == sorted(folder.replace("/", ".") for folder in folders)
    assert len(PACKAGES) == len(set(PACKAGES))


def test_pyproject_lists_the_modules_that_exist() -> None:
    assert MODULES == ["qlora"]
    assert (ROOT / "qlora.py").is_file()


def test_the_editable_install_is_a_path_file(install: Install) -> None:
    """A finder would run after Python's own, and lose to any data/ folder in the working directory."""
    names = zipfile.ZipFile(install.wheel).namelist()
    (path_file,) = [name for name in names if name.endswith(".pth")]
    assert not [name for name in names if name.endswith(".py")]
    entries = (install.site / path_file).read_text().split()
    assert [Path(entry).resolve() for entry in entries] == [install.repository.resolve()]


def test_names_are_ours_in_a_folder_that_has_its_own_data_and_models(install: Install, users_folder: Path) -> None:
    names = [*PACKAGES, *MODULES]
    code = f"import importlib, json; print(json.dumps([importlib.import_module(n).__file__ for n in {names!r}]))"
    files = json.loads(install.run(code, cwd=users_folder))
    assert {Path(file).resolve().relative_to(install.repository.resolve()).parts[0] for file in files} == {
        *[name.partition(".")[0] for name in PACKAGES],
        *[f"{name}.py" for name in MODULES],
    }


def test_the_command_is_ours_even_beside_python_packages_of_those_names(install: Install, users_folder: Path) -> None:
    """A console script has its own folder on the path, not the working directory."""
    for name in ("data", "models", "kernels"):
        (users_folder / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    script = "sys.path.pop(0) if sys.path[0] == '' else None\nimport data, models, kernels\nprint(data.__file__)"
    assert Path(install.run(script, cwd=users_folder).strip()).resolve().is_relative_to(install.repository.resolve())


def test_a_foreign_kernels_package_is_named_with_ours(install: Install, tmp_path: Path) -> None:
    """Hugging Face's `kernels`, installed in the same environment, is found before the path file's entry."""
    site = tmp_path / "site"
    copytree(install.site, site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    using_kernels = [
        name for name in [*PACKAGES, *MODULES] if name.partition(".")[0] not in ("quant", "kernels", "data")
    ]
    code = f"""
import importlib, json
errors = {{}}
for name in {using_kernels!r}:
    try:
        importlib.import_module(name)
        errors[name] = None
    except ImportError as error:
        errors[name] = str(error)
print(json.dumps(errors))
"""
    errors = json.loads(install.run(code, cwd=tmp_path, site=site))
    assert errors["lora"] is not None
    for name, message in errors.items():
        if message is not None:
            assert str(site / "kernels") in message, name
            assert str(install.repository / "kernels") in message, name
            assert "\n" not in message, name


def test_what_hugging_faces_kernels_has_and_ours_has_not_is_explained() -> None:
    ours = str(Path(kernels.__file__).parent)
    with pytest.raises(ImportError, match="Hugging Face's `kernels` package") as caught:
        from kernels import get_kernel  # noqa: F401
    assert ours in str(caught.value)
    assert not hasattr(kernels, "__a_dunder_that_is_missing__")


def test_an_install_that_is_not_editable_stops_with_one_line(install: Install, tmp_path: Path) -> None:
    """It would drop packages called data and models into site-packages, over those of others."""
    built = build("build_wheel", install.repository, tmp_path / "wheels")
    assert built.returncode != 0
    assert "pip install -e" in built.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "wheels").glob("*.whl"))
