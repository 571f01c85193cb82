"""Keep of a run what sampling needs: a small checkpoint to pass on.

  python tools/strip.py RUN FOLDER [--half]         # for instance runs/diffusion-mnist pretrained/diffusion-mnist

RUN is the folder of a trained run of any of the six scripts. FOLDER/checkpoint.pt gets the averaged networks, which the
script's load() reads, the config and the facts of the data. It gets neither the optimizer nor the weights that were being
trained. Settings that belong to the training's machine or command (folders, device) go back to their defaults.
It is read as any other: `load(FOLDER)`, `--mode sample --out FOLDER`, `--init FOLDER`. It cannot be resumed.
--half writes the weights in float16: half the size, and images that differ a little from those of the run.
Prints the size and the SHA-256 of the file.
"""

import argparse
import hashlib
import importlib
import io
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the scripts and the other tools, from whatever directory this is run

from sync import SCRIPTS

ABOUT = ("format", "script", "config", "facts", "step", "seconds")
ALSO = {"gan": ["discriminator"]}  # what load() reads besides the averages
# settings of the training's machine or command
DEFAULT = ("data_dir", "device", "compile", "kernels", "out", "init", "mode", "resume", "overwrite", "num_samples",
           "eval_images")


def script_of(folder):
    """The module of the script that the run in a folder is of. Exits with 1 and one line where there is none."""
    path = Path(folder, "checkpoint.pt")
    try:
        name = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["script"]
    except Exception as e:  # whatever a missing, damaged or hostile file raises
        sys.exit(f"error: {path}: no checkpoint of a run ({type(e).__name__})")
    if f"{name}.py" not in SCRIPTS:
        sys.exit(f"error: {path}: of a script that is not here: {name}")
    return importlib.import_module(name)


def to_half(weights):
    """A state_dict with its real numbers in float16. A network's load_state_dict turns them into its own type again."""
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def strip(run, folder, half=False):
    """Write folder/checkpoint.pt, the small checkpoint of the run, in float16 with `half` -> its bytes.

    Exits with one line where `run` holds no run, or where it would overwrite what is not a small checkpoint.
    """
    script = script_of(run)
    path = Path(folder, "checkpoint.pt")
    if path.exists() and "scaler" in script_of(folder).read_run(folder)[1]:
        sys.exit(f"error: {path}: is of a whole run, which could not be resumed any more; give another folder")
    _, saved = script.read_run(run)
    state = {name: saved[name] for name in ABOUT}
    state["config"] = saved["config"] | {name: getattr(script.Config, name) for name in DEFAULT}
    state["log_size"] = 0  # its log stays with the run
    kept = [name for name in saved if name.startswith("ema_")] + ALSO.get(script.__name__, [])
    state |= {name: to_half(saved[name]) if half else saved[name] for name in kept}
    torch.save(state, buffer := io.BytesIO())
    script.write(path, lambda f: f.write(buffer.getbuffer()), f"what sampling needs of {run}: {', '.join(kept)}")
    script.load(folder)
    return buffer.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("folder", help="folder of the checkpoint to write")
    parser.add_argument("--half", action="store_true", help="weights in float16")
    args = parser.parse_args(argv)
    data = strip(args.run, args.folder, args.half)
    print(f"{len(data) / 1e6:.2f} MB, SHA-256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
