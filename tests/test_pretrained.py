"""pretrained/: the checkpoints are those of its README's table, load, and give the samples and figures that it names."""

import hashlib
import importlib
import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch

from tiny import ROOT, SCRIPTS, load_checkpoint, load_tool, run, tiny_run

strip = load_tool("strip")
evaluate = load_tool("evaluate")

FOLDER = ROOT / "pretrained"
COLUMNS = ["name", "size", "SHA-256", "command of the training", "figure of the first 500 test images",
           "distance of 1,000 samples"]
FIGURES = {  # how the last line of metrics.jsonl is written in the table
    "vae": "{test_neg_iw_100:.2f} nats",
    "flow": "{test_bpd:.3f} bits/dim",
    "gan": "none",
    "autoregressive": "{test_nats:.2f} nats",
    "diffusion": "{test_bpd:.3f} bits/dim",
    "vqgan": "PSNR {test_psnr:.2f} dB, {test_bits_per_code:.3f} bits a code",
}
# Of 200 samples: the least share that the classifier takes for their class, and the largest distance. Chance gives 0.1.
# 200 real test images have a distance of about 1; black and white ones, as autoregressive.py draws them, have 4.7.
BOUNDS = {"vae": (None, 9.0), "flow": (0.6, 5.0), "gan": (0.9, 3.0), "autoregressive": (0.7, 8.0),
          "diffusion": (0.95, 2.5), "vqgan": (0.85, 3.5)}


def table(text):
    """name -> the other cells of its row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == COLUMNS and set(rows[1]) == {"---"}, "the table of pretrained/README.md has other columns"
    assert all(len(row) == len(COLUMNS) for row in rows)
    names = [row[0].strip("`") for row in rows[2:]]
    assert len(set(names)) == len(names)
    return {name: dict(zip(COLUMNS[1:], row[1:], strict=True)) for name, row in zip(names, rows[2:], strict=True)}


def numbers(cell):
    return [float(number) for number in re.findall(r"\d+\.\d+", cell)]


ROWS = table((FOLDER / "README.md").read_text(encoding="utf-8"))
NAMES = [f"{name}-mnist" for name in SCRIPTS]


@pytest.fixture(params=NAMES)
def name(request):
    if not (FOLDER / request.param).is_dir():
        pytest.skip(f"there is no pretrained/{request.param}")
    return request.param


@pytest.fixture
def module(name):
    return importlib.import_module(name.removesuffix("-mnist"))


@pytest.fixture
def copy(name, tmp_path):
    """A folder with the checkpoint alone, to write beside it."""
    (tmp_path / name).mkdir()
    shutil.copy(FOLDER / name / "checkpoint.pt", tmp_path / name)
    return tmp_path / name


def test_every_folder_stands_in_the_table():
    folders = {path.parent.name for path in FOLDER.glob("*/checkpoint.pt")} | {p.name for p in FOLDER.iterdir() if p.is_dir()}
    assert folders == ROWS.keys() and folders <= set(NAMES)


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*/checkpoint.pt")) < 15e6


def test_git_takes_checkpoints_and_nothing_else():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git repository")
    files = [f"pretrained/vae-mnist/{name}" for name in ("checkpoint.pt", "metrics.jsonl", "sampled/samples.npz", "x.png")]
    done = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == files[1:]


def test_the_table_is_read():
    row = ["`vae-mnist`", "1.20 MB", "`ab`", "`python vae.py`", "89.15 nats", "6.001"]
    lines = "\n".join(f"|{'|'.join(cells)}|" for cells in (COLUMNS, ["---"] * 6, row))
    text = f"words\n\n{lines}\n\nmore"
    assert table(text) == {"vae-mnist": dict(zip(COLUMNS[1:], row[1:], strict=True))}
    assert numbers("PSNR 21.30 dB, 3.912 bits a code") == [21.3, 3.912]
    with pytest.raises(AssertionError, match="other columns"):
        table(text.replace("SHA-256", "hash"))


# ---- the checks, each a function of a folder, so that they are tried on a tiny run too


def check_file(path, row):
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert row["size"] == f"{len(data) / 1e6:.2f} MB"
    assert row["SHA-256"].strip("`") == digest


def check_contents(folder, module):
    """What is there is what sampling needs, and of no machine."""
    saved = load_checkpoint(folder)
    parts = {key for key, value in saved.items() if isinstance(value, dict)} - {"config", "facts"}
    assert parts and all(key.startswith("ema_") for key in parts - set(strip.ALSO.get(module.__name__, [])))
    assert all(saved["config"][field] == getattr(module.Config, field) for field in strip.DEFAULT)
    *networks, cfg = module.load(folder)
    assert all(p.isfinite().all() and not p.requires_grad for network in networks for p in network.parameters())
    assert isinstance(cfg, module.Config)


def check_command(folder, module, command):
    """The command names this script, and its settings are those of the checkpoint."""
    python, program, *argv = shlex.split(command)
    assert (python, program) == ("python", f"{module.__name__}.py")
    cfg, _ = module.parse_args([*argv, "--out", str(folder / "new")])
    config = load_checkpoint(folder)["config"]
    for field, value in vars(cfg).items():
        if value != getattr(module.Config, field) and field not in strip.DEFAULT:
            assert config[field] == value, f"the command has {field} = {value}, the checkpoint {config[field]}"


def figure(folder, module, data_dir, images, monkeypatch):
    """The figure of the table, as `--mode eval` has it."""
    if module.__name__ == "vqgan":  # which codes the train images use is not in the table, so a few will do
        def few(model, images, run, real=module.to_indices):
            return real(model, images[:1000], run)

        monkeypatch.setattr(module, "to_indices", few)
    argv = ["--mode", "eval", "--eval-images", images, "--data-dir", data_dir, "--device", "cpu", "--out", folder]
    argv += ["--iw-samples", 100] if module.__name__ == "vae" else []
    assert run(module, argv) == 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return FIGURES[module.__name__].format(**last)


def samples(folder, module, n):
    assert run(module, ["--mode", "sample", "--num-samples", n, "--device", "cpu", "--out", folder]) == 0
    with np.load(folder / "sampled" / "samples.npz") as arrays:
        return arrays["images"], arrays.get("labels")


def test_the_file_is_that_of_the_table(name):
    check_file(FOLDER / name / "checkpoint.pt", ROWS[name])


def test_it_holds_what_sampling_needs(name, module):
    check_contents(FOLDER / name, module)


def test_the_command_of_the_training_is_its_own(name, module, copy):
    check_command(copy, module, ROWS[name]["command of the training"].strip("`"))


def test_samples_are_digits(name, module, copy):
    """As the classifier of tools/evaluate.py sees 200 of them; 1,000 have a smaller distance, as its bias falls with n."""
    accuracy, distance = BOUNDS[module.__name__]
    images, labels = samples(copy, module, 200)
    classifier = evaluate.load_classifier("mnist")
    features = evaluate.features(images, classifier)
    found = evaluate.distance_to_train(features, classifier)
    assert found < distance
    if accuracy is not None:
        assert (evaluate.predict(features, classifier) == labels).mean() > accuracy
    (of_table,) = numbers(ROWS[name]["distance of 1,000 samples"])
    assert 0.2 * found < of_table < found, f"1,000 samples have {of_table} in the table, 200 have {found}"


def test_the_figure_is_that_of_the_table(name, module, copy, data_dir, monkeypatch):
    of_table = ROWS[name]["figure of the first 500 test images"]
    found = figure(copy, module, data_dir, 500, monkeypatch)
    assert re.sub(r"[\d.]+", "", found) == re.sub(r"[\d.]+", "", of_table), f"the table has {of_table}, the evaluation {found}"
    assert numbers(found) == pytest.approx(numbers(of_table), rel=0.01)


# ---- the checks themselves, on tiny runs, as long as there may be no folder to check


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_checks_take_a_stripped_run_and_no_other(script, tmp_path, monkeypatch):
    module = tiny_run(script, tmp_path / "whole", *(["--iw-samples", 100] if script == "vae" else []))
    data = strip.strip(tmp_path / "whole", tmp_path / "small")
    row = {"size": f"{len(data) / 1e6:.2f} MB", "SHA-256": f"`{hashlib.sha256(data).hexdigest()}`"}
    check_file(tmp_path / "small" / "checkpoint.pt", row)
    check_contents(tmp_path / "small", module)
    check_command(tmp_path / "small", module, f"python {script}.py --steps 12 --seed 3 --lr 0.02 --width 8")
    for bad in ("--steps 13", "--seed 4", "--dataset mnist"):
        with pytest.raises(AssertionError, match="the command has"):
            check_command(tmp_path / "small", module, f"python {script}.py --steps 12 {bad}")
    with pytest.raises(AssertionError):
        check_contents(tmp_path / "whole", module)
    with pytest.raises(AssertionError):
        check_file(tmp_path / "whole" / "checkpoint.pt", row)
    found = figure(tmp_path / "small", module, "data", 8, monkeypatch)
    assert found == FIGURES[script].format(**json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1]))
    images, labels = samples(tmp_path / "small", module, 3)
    assert images.shape == (3, 8, 8, 1) and (labels is None) == (script == "vae")


def test_the_bounds_tell_digits_from_noise():
    """Noise is no digit: its distance is beyond every bound, and its classes are right by chance alone."""
    classifier = evaluate.load_classifier("mnist")
    noise = torch.randint(256, (200, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = evaluate.features(noise, classifier)
    assert evaluate.distance_to_train(features, classifier) > 2 * max(distance for _, distance in BOUNDS.values())
    right = (evaluate.predict(features, classifier) == np.arange(200) % 10).mean()
    assert right < 0.5 * min(accuracy for accuracy, _ in BOUNDS.values() if accuracy is not None)
