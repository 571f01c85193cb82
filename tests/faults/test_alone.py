"""A script copied alone into an empty folder works: no kernels/, no tools/, no matter from where it is started."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiny import ROOT, SCRIPTS, TINY, Child, error_line, flags, load_checkpoint, run_file

every_script = pytest.mark.parametrize("name", SCRIPTS)
more_scripts = pytest.mark.parametrize("name", SCRIPTS if os.environ.get("M2_ALL_VARIANTS") else ["gan", "vqgan"])


@pytest.fixture
def alone(tmp_path):
    """alone(name): the only file of an empty folder."""
    def copy(name):
        folder = tmp_path / "alone"
        folder.mkdir()
        return Path(shutil.copy(ROOT / f"{name}.py", folder))
    return copy


def environment(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more


@more_scripts
def test_alone_in_a_folder(name, alone):
    """A new interpreter, from that folder, with no --out: everything lies in runs/ there."""
    path = alone(name)
    argv = [f for f in flags(name, "") if f not in ("--out", "")]
    done = subprocess.run([sys.executable, path.name, *argv], cwd=path.parent, env=environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "runs"])
    out = path.parent / "runs" / f"{name}-digits"
    assert load_checkpoint(out)["step"] == 4
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", "samples.npz"} <= {
        p.name for p in out.iterdir()}
    assert np.load(out / "samples.npz")["images"].shape == (4, 8, 8, 1)


@every_script
def test_from_another_folder(name, alone, tmp_path):
    """Started from elsewhere it writes there, and nothing beside the script."""
    path = alone(name)
    argv = [f for f in flags(name, "") if f not in ("--out", "")]
    child = Child(tmp_path / "elsewhere", run_file, path, argv)
    assert child.join() == 0, child.stderr
    assert load_checkpoint(tmp_path / "elsewhere" / "runs" / f"{name}-digits")["step"] == 4
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@every_script
def test_by_another_name(name, alone, tmp_path):
    """The name of the file is the name of the run and of what its checkpoints say they belong to."""
    path = alone(name)
    path = path.rename(path.with_name("my_model.py"))
    child = Child(tmp_path / "elsewhere", run_file, path, [f for f in flags(name, "") if f not in ("--out", "")])
    assert child.join() == 0, child.stderr
    assert load_checkpoint(tmp_path / "elsewhere" / "runs" / "my_model-digits")["script"] == "my_model"


FAKES = {  # what PyPI's unrelated package of this name, or somebody's file, may look like
    "package": {"kernels/__init__.py": "from .layer import get_kernel\n__all__ = ['get_kernel']\n",
                "kernels/layer.py": "def get_kernel(name):\n    raise RuntimeError('no hub')\n"},
    "module": {"kernels.py": "mode = 'theirs'\n"},
    "empty": {"kernels/__init__.py": ""},
    "folder": {"kernels/README": "not a package at all"},
    "wants what is not here": {"kernels/__init__.py": "import some_package_that_nobody_has\n"},
}


def run_beside(path, place, argv):
    """The script with one more folder at the end of the path, where installed packages are."""
    sys.path.append(str(place))
    run_file(path, argv)


@pytest.mark.parametrize("name, fake, beside", [
    (name, fake, beside) for name in SCRIPTS for fake in FAKES for beside in (True, False)
    if os.environ.get("M2_ALL_VARIANTS") or name == "gan" or (fake, beside) in (("package", True), ("module", False))])
def test_another_package_named_kernels_does_no_harm(name, fake, beside, alone, tmp_path):
    """It is imported, the kernels and the device are chosen; then the one thing that is wrong here is named."""
    path = alone(name)
    place = path.parent if beside else tmp_path / "site"
    for file, text in FAKES[fake].items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(text)
    whole = fake == "package"  # one of them is trained with
    more = ["--steps", "1"] if whole else ["--dataset", "nowhere"]
    child = Child(tmp_path / "elsewhere", run_beside, path, place, [*flags(name, "run"), *more])
    assert child.join() == (0 if whole else 2), child.stderr
    if whole:
        assert load_checkpoint(tmp_path / "elsewhere" / "run")["step"] == 1
    else:
        assert "--dataset nowhere" in error_line(child.stderr)


@every_script
def test_triton_without_the_folder_is_refused(name, alone, tmp_path):
    path = alone(name)
    child = Child(tmp_path / "elsewhere", run_file, path, [*flags(name, "run"), "--kernels", "triton"])
    assert child.join() == 2
    assert re.fullmatch(r"error: --kernels triton: .*kernels/.*\n", child.stderr)
    assert not (tmp_path / "elsewhere" / "run").exists()


@every_script
@pytest.mark.parametrize("fake", ["package", "module"])
def test_triton_with_nothing_but_another_package_is_refused(name, fake, alone, tmp_path):
    path = alone(name)
    for file, text in FAKES[fake].items():
        (path.parent / file).parent.mkdir(exist_ok=True)
        (path.parent / file).write_text(text)
    child = Child(tmp_path / "elsewhere", run_file, path, [*flags(name, "run"), "--kernels", "triton"])
    assert child.join() == 2
    assert "kernels/" in error_line(child.stderr)


@every_script
def test_help_of_a_lone_copy(name, alone, tmp_path):
    path = alone(name)
    child = Child(tmp_path / "elsewhere", run_file, path, ["--help"])
    assert child.join() == 0 and child.stderr == ""
    assert all(f in child.stdout for f in TINY[name].split() if f.startswith("--"))
