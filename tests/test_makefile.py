"""What `make` says where Python is missing, old or incomplete, and what it rebuilds.

A small stand-in is installed with the real pip, so nothing is fetched.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# A build backend of its own, which makes an empty package: no download, no hatchling.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tlpipe"
version = "0"
"""
BACKEND = """
from pathlib import Path
from zipfile import ZipFile

FILES = {
    "tlpipe_demo.py": ["def main(): print('demo ran')"],
    "tlpipe-0.dist-info/METADATA": [
        "Metadata-Version: 2.1", "Name: tlpipe", "Version: 0",
        "Provides-Extra: demo", "Provides-Extra: dev",
    ],
    "tlpipe-0.dist-info/WHEEL": [
        "Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any",
    ],
    "tlpipe-0.dist-info/entry_points.txt": ["[console_scripts]", "tlpipe = tlpipe_demo:main"],
    "tlpipe-0.dist-info/RECORD": [],
}

def build_editable(folder, config_settings=None, metadata_directory=None):
    with Path("builds").open("a") as builds:
        print("built", file=builds)
    name = "tlpipe-0-py3-none-any.whl"
    with ZipFile(Path(folder) / name, "w") as wheel:
        for path, lines in FILES.items():
            wheel.writestr(path, "".join(line + chr(10) for line in lines))
    return name

build_wheel = build_editable
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout, in a folder with a space in its name, of a package that needs nothing."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "constraints.txt").write_text("")
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


def n_builds(folder: Path) -> int:
    return len((folder / "builds").read_text().splitlines())


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_help_is_the_default(checkout):
    done = make(checkout)

    assert done.returncode == 0
    for target in ["demo", "test", "check", "soak", "bench", "clean"]:
        assert f"  make {target} " in done.stdout


def test_a_missing_python_is_named(checkout):
    done = make(checkout, "demo", "PYTHON=/no/such/python3")

    assert done.returncode == 2
    assert "there is no /no/such/python3 here, and tlpipe needs Python 3.11 or newer" in done.stderr
    assert "make demo PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_refused(checkout):
    old = fake_python(checkout, 'case "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac')

    done = make(checkout, "test", old)

    assert done.returncode == 2
    assert "needs Python 3.11 or newer, but " in done.stderr
    assert "is 3.9.2." in done.stderr
    assert "make test PYTHON=python3.12" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_ensurepip_says_what_to_install(checkout):
    bare = fake_python(checkout, 'case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac')

    done = make(checkout, "demo", bare)

    assert done.returncode == 2
    assert "apt install python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_installation_is_done_once_mended_and_follows_a_move(checkout):
    python = f"PYTHON={sys.executable}"

    # The creation of the environment was interrupted: it is made anew, not trusted.
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / ".making").touch()
    first = make(checkout, "demo", python)
    assert "Making .venv" in first.stdout
    assert first.stdout.endswith("demo ran\n"), first.stderr

    # Once is enough.
    assert make(checkout, "demo", python).stdout == "demo ran\n"
    assert n_builds(checkout) == 1

    # What dev installs serves the demo too, and a changed dependency is installed.
    both = make(checkout, "--jobs=4", "bench", "demo", python)
    assert "Installing tlpipe[dev]" in both.stdout
    assert both.stdout.endswith("No benchmarks yet.\ndemo ran\n")
    (checkout / "pyproject.toml").touch()
    assert "Installing tlpipe[dev]" in make(checkout, "demo", python).stdout
    assert n_builds(checkout) == 3

    # A moved checkout does not run what its environment once pointed to.
    moved = checkout.rename(checkout.with_name("elsewhere"))
    assert "Installing tlpipe[dev]" in make(moved, "demo", python).stdout
    assert make(moved, "demo", python).stdout == "demo ran\n"

    # A failed installation is not taken for a finished one.
    (moved / "constraints.txt").write_text("this is not a constraint\n")
    assert make(moved, "demo", python).returncode == 2
    assert make(moved, "demo", python).returncode == 2

    # Stores outlive a cleaning.
    (moved / "cache" / "flowers").mkdir(parents=True)
    make(moved, "distclean")
    assert (moved / "cache" / "flowers").exists()
    assert not (moved / ".venv").exists()
