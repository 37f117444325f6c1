"""The wheel, installed outside the checkout, is whole: it starts, trains and finds its own data and templates."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SAYS = """
import reftlens, reftlens.tasks.emoji as emoji, reftlens.files as files
print(reftlens.__file__, emoji.data_file("emoji.jsonl"), sep="\\n")
"""


def run(*command, cwd, **environment):
    """What a command prints, in an environment that knows nothing of the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist."""
    pytest.importorskip("hatchling", reason='needs hatchling: pip install -e ".[test]"')
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The `bin` of an environment that has the wheel, and sees the packages that this one has."""
    folder = tmp_path_factory.mktemp("outside")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    scripts = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--no-deps", "--no-index", "-q", built[0], cwd=folder)
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = Path(run(scripts / "python", "-c", asked, cwd=folder).strip())
    # Its own .pth files, such as that of the checkout, are not read from there.
    (own / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    return scripts


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_installed_package_is_not_the_checkout_and_finds_its_data(installed, tmp_path):
    package, data = map(Path, run(installed / "python", "-c", SAYS, cwd=tmp_path).split())
    assert ROOT not in package.parents and installed.parent in package.parents
    assert data.parent.parent == package.parent and data.is_file()


def test_the_command_line_starts_and_the_doctor_is_content(installed, tmp_path):
    said = run(installed / "reftlens", "--help", cwd=tmp_path)
    assert all(command in said for command in ("demo", "chat", "report", "search", "run", "judge", "doctor"))
    said = run(installed / "reftlens", "doctor", cwd=tmp_path)
    assert "reftlens 0." in said and "tiny random model: trained 2 steps" in said


def test_the_demo_runs_from_there(installed, smol, tmp_path):
    said = run(installed / "reftlens", "demo", "--steps", "2", "--quiet", "--out", tmp_path / "emoji", cwd=tmp_path)
    assert "strength" in said and (tmp_path / "emoji" / "reft.json").is_file()


def test_the_wheel_holds_all_of_the_package_and_nothing_else(built):
    tracked = run("git", "ls-files", "reftlens", "data", cwd=ROOT).split()
    wanted = {name if name.startswith("reftlens/") else f"reftlens/data_files/{name[5:]}" for name in tracked}
    assert wanted <= names_in(built[0])
    assert not [name for name in names_in(built[0]) if not name.startswith("reftlens/") or "__pycache__" in name]


def test_the_sdist_makes_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=unpacked)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert names_in(again) == names_in(built[0])
