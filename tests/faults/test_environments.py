"""Places where a script may have to run: no environment, names of every kind, a source tree that is read-only, no Triton."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tiny import ROOT, SCRIPTS, Child, flags, load_checkpoint, run_file

# the block that meets the environment is the same in all six: two of them in the ordinary run, all with M2_ALL_VARIANTS=1
every_script = pytest.mark.parametrize("name", SCRIPTS if os.environ.get("M2_ALL_VARIANTS") else ["gan", "vqgan"])
ODD = "two words, é ü 数\nand a new line"  # a folder's name


def assert_whole(out, step=4):
    assert load_checkpoint(out)["step"] == step
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["final"] is True
    assert np.load(out / "samples.npz")["images"].shape == (4, 8, 8, 1)


def copy_of_the_source(name, folder):
    """The script, with kernels/ beside it."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return shutil.copy(ROOT / f"{name}.py", folder)


@pytest.mark.parametrize("name", SCRIPTS if os.environ.get("M2_ALL_VARIANTS") else ["vqgan"])
def test_no_environment_at_all(name, tmp_path):
    """No HOME, no PATH, and a C locale in which Python takes every file's name and every stream for ASCII."""
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, ROOT / f"{name}.py", *flags(name, tmp_path / ODD / "run")]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"Traceback" not in done.stderr
    assert_whole(tmp_path / ODD / "run")
    again = subprocess.run([*argv, "--resume", "--steps", "5"], env=env, cwd=tmp_path, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert_whole(tmp_path / ODD / "run", 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ODD]


@every_script
def test_odd_names_of_everything(name, tmp_path):
    """The script, its folder, the data, a class and the run: with spaces, accents and a new line."""
    path = copy_of_the_source(name, tmp_path / ODD)
    for i in range(12):
        image = tmp_path / ODD / "data" / ("plain", ODD)[i % 2] / f"{ODD}{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (8, 8), np.uint8)).save(image)
    out = tmp_path / ODD / "run"
    argv = flags(name, out, "--dataset", tmp_path / ODD / "data")
    child = Child(tmp_path / "child", run_file, path, argv)
    assert child.join() == 0, child.stderr
    assert_whole(out)
    if name != "vae":  # which has no classes
        assert json.loads((out / "config.json").read_text())["names"] == sorted(["plain", ODD])
    again = Child(tmp_path / "again", run_file, path, ["--mode", "sample", "--out", out, "--num-samples", 3])
    assert again.join() == 0, again.stderr
    assert np.load(out / "sampled" / "samples.npz")["images"].shape == (3, 8, 8, 1)


@pytest.fixture
def read_only(tmp_path):
    """read_only(make): a folder that make(folder) filled and that nobody, not even root, can write to."""
    folder = tmp_path / "source"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0
    if not mounted and os.geteuid() == 0:
        pytest.skip("root without the right to mount a disk can write everywhere")

    def fill(make):
        made = make(folder / "of")
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            for place in (folder, *folder.rglob("*")):
                place.chmod(0o555)
        with pytest.raises(OSError):
            (folder / "of" / "new").touch()
        return made
    yield fill
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)
    else:
        for place in (folder, *folder.rglob("*")):
            place.chmod(0o755)


@every_script
def test_a_source_tree_that_is_read_only(name, read_only, tmp_path):
    path = read_only(lambda folder: copy_of_the_source(name, folder))
    child = Child(tmp_path / "elsewhere", run_file, path, [f for f in flags(name, "") if f not in ("--out", "")])
    assert child.join() == 0, child.stderr
    assert_whole(tmp_path / "elsewhere" / "runs" / f"{name}-digits")


def without_triton(path, argv):
    for module in [m for m in sys.modules if m.split(".")[0] == "triton"]:
        del sys.modules[module]
    sys.modules["triton"] = None  # importing it raises ImportError, as where it is not installed
    run_file(path, argv)
    assert "kernels" in sys.modules and sys.modules["triton"] is None


@every_script
def test_no_triton(name, tmp_path):
    """kernels/ is there, and gives its plain forms."""
    path = copy_of_the_source(name, tmp_path / "source")
    child = Child(tmp_path / "elsewhere", without_triton, path, flags(name, "run"))
    assert child.join() == 0, child.stderr
    assert_whole(tmp_path / "elsewhere" / "run")
