"""`pip install ./kernels` as the package m2_kernels: its wheel, built without network from a copy of the folder."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels"
NEEDED = 77  # setuptools, as kernels/pyproject.toml says: earlier ones do not read its license


def setuptools():
    """Why no wheel can be built here, or nothing."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "setuptools is not installed"
    return "" if int(version.split(".")[0]) >= NEEDED else f"setuptools {version}, {NEEDED} is needed"


pytestmark = pytest.mark.skipif(bool(setuptools()), reason=setuptools() or "setuptools is there")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(FOLDER, place / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    flags = "--no-deps --no-build-isolation --no-index --disable-pip-version-check --no-cache-dir --quiet"
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *flags.split(), "--wheel-dir", place, place / "source"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "installed")
    return place / "installed"


def python(installed, folder, code, *more):
    """Run in a folder that is not the repository, with the package, and what else is named, on the path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (installed, *more)))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_in_the_wheel(installed):
    """The modules, and the mark by which type checkers know that their hints are to be read (PEP 561)."""
    files = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    wanted = {f"m2_kernels/{p.name}" for p in FOLDER.glob("*.py")} | {"m2_kernels/py.typed"}
    assert {f for f in files if not f.startswith("m2_kernels-")} == wanted
    metadata, = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert re.search(r"^Name: m2[-_]kernels$", text, re.M) and "License-Expression: MIT" in text
    needs = re.findall(r"^Requires-Dist: (.*)$", text, re.M)
    assert [need for need in needs if "extra" not in need] == ["torch>=2.9"]
    assert all(need.startswith("triton;") for need in needs if "extra" in need)
    assert [p.read_text() for p in installed.glob("*.dist-info/**/LICENSE")] == [(ROOT / "LICENSE").read_text()]


def test_it_is_called_from_elsewhere(installed, tmp_path):
    """The README's call; an operation, its layer, in Triton's interpreter or on the GPU where there is one."""
    code = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)[1]
    code += f"""
assert torch.allclose(x, x_again, atol=1e-4) and torch.allclose(log_det, -minus_log_det, atol=1e-4)
import sys, m2_kernels
from m2_kernels.masked_conv import masked_conv2d
from m2_kernels.modules import MaskedConv2d
assert m2_kernels.__file__.startswith({str(installed)!r}) and "kernels" not in sys.modules
conv = MaskedConv2d(8, 3, 3).to({"cpu" if kernels.INTERPRETING else "cuda"!r})
x = x[:1, :, :4, :4].to(conv.weight)
results = [masked_conv2d(x, conv.weight, conv.bias, backend=backend) for backend in ("torch", "triton")]
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(conv(x), results[0], rtol=1e-4, atol=1e-4)
print(m2_kernels.report())
"""
    assert len(python(installed, tmp_path, code).splitlines()) == len(kernels.OPS)


def test_beside_the_folder_of_the_scripts(installed, tmp_path):
    """Both in one process: operators are named after their package, and each has its own mode."""
    code = f"""
import kernels, kernels.masked_conv, m2_kernels, m2_kernels.masked_conv, torch
kernels.mode = "triton"
m2_kernels.mode = "torch"
x = torch.randn(1, 2, 3, 3, device={"cpu" if kernels.INTERPRETING else "cuda"!r})
weight = torch.randn(4, 2, 3, 3, device=x.device)
want = kernels.masked_conv.masked_conv2d(x, weight)
for module in (kernels, m2_kernels):
    operator = getattr(torch.ops, module.__name__).masked_conv_fwd
    torch.testing.assert_close(operator(x, weight, None, 5), want)
    torch.testing.assert_close(module.masked_conv.masked_conv2d(x, weight), want)
m2_kernels.masked_conv.launch = None
m2_kernels.masked_conv.masked_conv2d(x, weight)
print(kernels.mode, m2_kernels.mode)
"""
    assert python(installed, tmp_path, code, ROOT) == "triton torch\n"


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a clone of the repository")
def test_what_a_build_leaves_is_ignored():
    left = ["kernels/build/lib/m2_kernels/__init__.py", "kernels/m2_kernels.egg-info/PKG-INFO"]
    ignored = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True).stdout
    assert ignored.split() == left
