"""README and docs: what they tell a reader to type works, their links lead somewhere, their figures agree."""

import argparse
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
import kernels.group_norm
from tiny import CORE, ROOT, SCRIPTS, TINY, flags, getsource, load_tool, run, sync

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md",
                ROOT / "pretrained" / "README.md"])
LANGUAGES = (".fr", ".zh-CN")
TRANSLATED = ("README", "docs/tradeoffs")
Command = namedtuple("Command", "page program argv")  # program: diffusion.py, tools/report.py; argv: strings
# What stands for something of the reader's own in a command, and what a test puts there.
PLACEHOLDERS = {"STEPS": "5", "SEED": "1", "N": "4", "S": "cached", "H": "8", "W": "8", "$s": "ddim", "$n": "4",
                "DATASET": "mnist", "OP": "attention", "THAT_SCRIPT.py": "gan.py"}
# A page's command, shortened for a run on digits or small photographs: its value of an option -> a smaller one.
SHORTER = {"--steps": "4", "--stage1": "2", "--width": "8", "--prior-width": "8", "--blocks": "1", "--image-size": "16",
           "--num-samples": "4", "--batch-size": "8", "--iw-samples": "2", "--patch": "2",
           "--sample-size": "48", "--flow-hidden": "8", "--nfe": "2", "--n-codes": "8", "--seeds": "1"}
RUN = ("README.md", "docs/usage.md", "docs/tradeoffs.md")  # the pages whose commands are all run, in their order


# ---- what stands in a page


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text):
    """The code blocks of a page, indented or fenced: (language, lines); an indented one has the language ''."""
    found = []
    language = None
    last = ""
    for line in text.splitlines():
        if line.startswith("```"):
            language = line.strip("`").strip() if language is None else None
            found += [(language, [])] if language is not None else []
        elif language is not None:
            found[-1][1].append(line)
        elif line.startswith("    "):
            if not last.startswith("    "):
                found.append(("", []))
            found[-1][1].append(line.removeprefix("    "))
        last = line
    return found


def shell_lines(text):
    """The lines to type of a page, without comments, lines that end in a backslash joined."""
    for language, lines in blocks(text):
        if language in ("", "bash", "sh"):
            yield from (line.split(" #")[0].strip() for line in "\n".join(lines).replace("\\\n", "").splitlines())


def commands(page):
    """The commands of a page that run one of our programs, those within its sentences and tables too."""
    text = text_of(page)
    lines = [*shell_lines(text), *re.findall(r"`([^`\n]*python [^`\n]*)`", text)]
    for part in (part for line in lines for part in re.split(r"&&|;|\bdo\b", line)):
        found = re.search(r"(?:python|torchrun .*?) ?([\w/]+\.py)\b(.*)", part)
        if found and "..." not in part:
            argv = [PLACEHOLDERS.get(word, word).replace("runs/NAME", "runs/diffusion-mnist") for word in shlex.split(found[2])]
            yield Command(page, found[1], argv)


ENGLISH = [page.relative_to(ROOT) for page in PAGES if not page.stem.endswith(LANGUAGES)]  # the others have the same commands
EVERY = list(dict.fromkeys((c.page, c.program, tuple(c.argv)) for page in ENGLISH for c in commands(page)))


def test_the_commands_are_found():
    """The reader of pages sees blocks of both kinds, joined lines, loops, tables and sentences."""
    assert len(EVERY) > 80 and {program for _, program, _ in EVERY} >= set(sync.SCRIPTS)
    text = "a `python gan.py`\n\n    python vae.py \\\n      --seed 2    # three\n\n```bash\nx && python flow.py\n```\n"
    assert list(shell_lines(text)) == ["python vae.py   --seed 2", "x && python flow.py"]
    assert [language for language, _ in blocks(text)] == ["", "bash"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_indented_code_is_code(page):
    """Lines that are indented after a list belong to its last item, and their ends are lost: there a fence is needed."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not re.search(r"^(?:[-*]|\d+\.) .*\n(?:[^\n]+\n)*\n+    ", text, re.M)


# ---- every command is one that its program takes


class Parsed(Exception):
    """What a tool's parser made of the command line."""


def shape_of(cfg):
    """The shape of the images that a command is about."""
    if cfg.image_size:
        return (3, cfg.image_size, cfg.image_size)
    known = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    return known.get(cfg.dataset, (3, 128, 128))


def check_script(module, argv, monkeypatch, tmp_path):
    """The parser takes the flags, as of a new run or, where they go on with one, beside that; the network can be built."""
    new = [word for i, word in enumerate(argv) if word != "--resume" and "--mode" not in (word, argv[i - 1])]
    monkeypatch.chdir(tmp_path)
    cfg, _ = module.parse_args(new)
    if len(new) < len(argv):
        (tmp_path / cfg.out).mkdir(parents=True)
        (tmp_path / cfg.out / "checkpoint.pt").touch()
        monkeypatch.setattr(module, "read_run", lambda folder: (cfg, {}))
        cfg, _ = module.parse_args(argv)
    classes = () if module.__name__ == "vae" else (10,)
    with torch.device("cpu" if module.__name__ == "flow" else "meta"):  # Glow runs once when it is built
        module.build(shape_of(cfg), *classes, cfg)


@pytest.mark.parametrize("page, program, argv", EVERY, ids=lambda v: " ".join(v) if isinstance(v, tuple) else str(v))
def test_every_command_is_taken(page, program, argv, monkeypatch, tmp_path, capsys):
    assert (ROOT / program).is_file(), f"{page} runs {program}, which is not there"
    monkeypatch.setattr("inspect.getsource", getsource)
    if "--help" in argv:
        return
    if program in sync.SCRIPTS:
        check_script(importlib.import_module(program.removesuffix(".py")), list(argv), monkeypatch, tmp_path)
        return
    if not re.search(r"ArgumentParser|peer\.arguments", text_of(program)):
        pytest.skip("takes the flags of a script, in a package's place")

    def parsed(parser, args=None, namespace=None, real=argparse.ArgumentParser.parse_known_args):
        raise Parsed(real(parser, list(argv), namespace)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)
    monkeypatch.setattr(sys, "argv", [program, *argv])
    monkeypatch.syspath_prepend(str((ROOT / program).parent))
    try:
        spec = importlib.util.spec_from_file_location("program_of_docs", ROOT / program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as e:
        pytest.skip(f"needs a package that is not here: {e}")
    with pytest.raises(Parsed) as left:
        module.main()
    monkeypatch.undo()
    rest = left.value.args[0]  # gan_stability.py hands it on to gan.py, soak.py to the scripts that it is given
    if rest:
        assert "parse_known_args" in text_of(program), f"{page}: {program} has no {rest}"
        for name in [word for word in argv if f"{word}.py" in sync.SCRIPTS] or ["gan"]:
            importlib.import_module(name).parse_args([*rest, "--overwrite", "--out", str(tmp_path / name)])


def test_flags_that_do_not_exist_are_seen(monkeypatch, tmp_path, capsys):
    """The test above fails for a flag with a slip of the pen, and for a value that is none."""
    import vae

    for argv in (["--prior", "flaw"], ["--level", "2"], ["--mode", "sample", "--z-dims", "3"]):
        with pytest.raises(SystemExit):
            check_script(vae, argv, monkeypatch, tmp_path)


# ---- the commands of README and others are really run, on digits, one after the other in one folder


def shortened(argv):
    """The command line with smaller numbers, digits for the large data sets, and steps in place of minutes."""
    argv = ["--steps" if word == "--minutes" else word for word in argv]
    short = []
    option = None
    for word in argv:
        option = word if word.startswith("--") else option
        known = {"mnist": "digits", "fashion_mnist": "digits"}.get(word, word)
        short.append(SHORTER.get(option, known) if word != option else word)
    return short


def run_command(command):
    """The exit code of a command, shortened, run in the current folder."""
    argv = shortened(command.argv)
    if command.program == "tools/photos.py":
        argv += ["--count", "8", "--size", "32"]
    if command.program == "tools/gan_stability.py":
        argv += ["--width", "8"]
    if command.program == "tools/levels.py":  # of a run on digits: MNIST is not there
        argv = [word.replace("pretrained/", "runs/") for word in argv]
    if command.program not in sync.SCRIPTS:
        return run_tool(command.program, argv)
    name = command.program.removesuffix(".py")
    if "--out" not in argv:  # the folder that the unshortened command writes to
        data = command.argv[command.argv.index("--dataset") + 1] if "--dataset" in command.argv else "digits"
        argv += ["--out", f"runs/{name}-{data}"]
    trains = not {"--mode", "--resume"} & set(argv)
    tiny = ["--overwrite", *CORE.split(), *TINY[name].split()] if trains else ["--eval-images", "4"]
    return run(importlib.import_module(name), [*tiny, *argv])


def run_tool(program, argv):
    module = load_tool(program.removeprefix("tools/").removesuffix(".py"))
    try:
        sys.argv = [program, *argv]
        module.main()
    except SystemExit as e:
        return e.code or 0
    return 0


@pytest.fixture
def workshop(tmp_path):
    """A folder to run commands in, with the trained networks and a folder of photographs in two classes."""
    folder = tmp_path / "workshop"
    shutil.copytree(ROOT / "pretrained", folder / "pretrained")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / "FOLDER" / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("page", RUN)
def test_commands_run(page, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("inspect.getsource", getsource)
    monkeypatch.setattr("sys.argv", sys.argv)  # put back afterwards
    monkeypatch.setattr("os.fsync", lambda fd: None)  # a busy disk is not what is tested
    done = []
    for command in commands(page):
        if command.program.startswith("tests/") or "--help" in command.argv:
            continue
        assert run_command(command) == 0, f"{page}: {command.program} {command.argv}: {capsys.readouterr().err}"
        done.append(command.program)
    assert len(done) >= 5


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in SCRIPTS)])
def test_lines_of_python_run(page, workshop, monkeypatch, capsys):
    """The blocks of Python, with the runs that they load."""
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("inspect.getsource", getsource)
    monkeypatch.setattr("os.fsync", lambda fd: None)
    monkeypatch.setitem(sys.modules, "m2_kernels", kernels)  # its name once it is installed
    monkeypatch.setitem(sys.modules, "m2_kernels.group_norm", kernels.group_norm)
    found = ["\n".join(lines) for language, lines in blocks(text_of(page)) if language == "python" or ".load(" in str(lines)]
    assert found
    for code in found:
        names = {name: importlib.import_module(name) for name in SCRIPTS if f"{name}." in code} | {"torch": torch}
        for folder in re.findall(r'load\("(runs/(\w+)-\w+)"\)', code):
            out, name = folder
            if not (workshop / out / "checkpoint.pt").exists() or "mnist" in out:
                data = ["--image-size", "28"] if "mnist" in out else []
                assert run(names[name], [*flags(name, out, *data, "--eval-images", "4"), "--overwrite"]) == 0
        exec(compile(code, page, "exec"), names)


# ---- links, figures, length and translations


def slugs(text):
    """The anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            assert re.fullmatch(r"https?://[\w.-]+\.\w+(/\S*)?", target), target
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(path.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_readme_is_short():
    assert len(text_of("README.md").split()) <= 900
    assert all(len(text_of(f"README{language}.md").splitlines()) <= 100 for language in ("", *LANGUAGES))
    for what in ("diffusion.py", "-m pytest"):
        assert f"    pip install -r requirements.txt && python {what}\n" in text_of("README.md")


@pytest.mark.parametrize("name", SCRIPTS)
def test_pages_of_the_models_have_one_shape(name):
    text = text_of(f"docs/{name}.md")
    headings = ["The idea", "From Python", "The maths", "How to read the file", "What is logged", "Results",
                "Choices measured", "What did not help", "Larger images and limits"]
    assert re.findall("^## (.*)", text, re.M) == headings
    assert len(re.findall("^!", text.split("## From Python")[0], re.M)) == 1  # a picture of the idea
    assert len(text.split()) <= 2500
    module = importlib.import_module(name)
    reading = text.split("## How to read the file")[1].split("## ")[0]
    assert [word for word in re.findall(r"`(\w+)`", reading) if not hasattr(module, word)] == []


def figures(text):
    """The numbers with a decimal point of a page, a decimal comma taken for one, code left out."""
    text = re.sub(r"(?s:```.*?```)|^    .*|`[^`\n]*`|\]\([^)]*\)", " ", text, flags=re.M)
    return sorted(re.findall(r"(?<![\d.])\d+\.\d+(?!\.?\d)", text))


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_figures_of_the_readme_stand_in_docs():
    docs = " ".join(text_of(f"docs/{name}.md") for name in ("results", *SCRIPTS))
    numbers = re.findall(r"\d+\.\d+", " ".join(row.split("|")[-2] for row in rows(text_of("README.md"))))
    assert len(numbers) == len(SCRIPTS)
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", docs)] == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", TRANSLATED)
def test_translations_say_the_same(name, language):
    """The same commands and code, pictures, tables and figures, in the same order; each leads to the others."""
    english = text_of(f"{name}.md")
    other = text_of(f"{name}{language}.md")
    assert [b for b in blocks(english) if b[0] == "python"] == [b for b in blocks(other) if b[0] == "python"]
    assert list(shell_lines(english)) == list(shell_lines(other))
    assert re.findall(r"!\[.*?\]\((.*?)\)", english) == re.findall(r"!\[.*?\]\((.*?)\)", other)
    assert [row.count("|") for row in rows(english)] == [row.count("|") for row in rows(other)]
    assert re.findall("^#+ ", english, re.M) == re.findall("^#+ ", other, re.M)
    dotted = re.sub(r"(?<=\d),(?=\d)", ".", other) if language == ".fr" else other
    for mine, theirs in zip(rows(english), rows(dotted), strict=True):
        assert figures(mine) == figures(theirs)
    assert figures(english) == figures(dotted)
    for a in ("", *LANGUAGES):
        start = "\n".join(text_of(f"{name}{a}.md").splitlines()[:5])
        assert all(f"]({name.split('/')[-1]}{b}.md)" in start for b in ("", *LANGUAGES) if b != a)
