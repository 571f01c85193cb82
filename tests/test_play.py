"""tools/strip.py: a small checkpoint that samples as the whole run does. tools/explore.py: a page to play with a run."""

import importlib
import math
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from tiny import ROOT, SCRIPTS, error_line, load_checkpoint, load_tool, run, tiny_run

strip = load_tool("strip")
explore = load_tool("explore")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> folder of a tiny digits run of each script."""
    folder = tmp_path_factory.mktemp("runs")
    for name in SCRIPTS:
        more = ["--nfe", 4] if name == "diffusion" else []  # 1 to 3 are one step, as guidance takes two evaluations
        tiny_run(name, folder / name, *more)
    return {name: folder / name for name in SCRIPTS}


@pytest.fixture(scope="module")
def explorers(runs):
    return {name: explore.Explorer(folder) for name, folder in runs.items()}


def sampled(module, folder):
    """What `--mode sample` of a run writes."""
    assert run(module, ["--mode", "sample", "--out", folder, "--num-samples", 6]) == 0
    with np.load(folder / "sampled" / "samples.npz") as arrays:
        return dict(arrays)


# ---- tools/strip.py


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_kept_samples_as_the_whole_run(runs, name, tmp_path, capsys):
    module = importlib.import_module(name)
    small = tmp_path / "small"
    assert strip.main([str(runs[name]), str(small)]) is None
    size, digest = capsys.readouterr().out.splitlines()[-1].split(" MB, SHA-256 ")
    data = (small / "checkpoint.pt").read_bytes()
    assert size == f"{len(data) / 1e6:.2f}" and digest == strip.hashlib.sha256(data).hexdigest()
    assert len(data) < (runs[name] / "checkpoint.pt").stat().st_size
    kept = load_checkpoint(small)
    tensors = {name for name, value in kept.items() if isinstance(value, dict)} - {"config", "facts"}
    assert all(name.startswith("ema_") for name in tensors - {"discriminator"}) and tensors
    assert ("discriminator" in tensors) == (name == "gan")  # its load gives D too
    whole = sampled(module, runs[name])
    again = sampled(module, small)
    assert whole.keys() == again.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], again[key])


@pytest.mark.parametrize("name", SCRIPTS)
def test_half_is_nearly_the_same(runs, name, tmp_path):
    module = importlib.import_module(name)
    whole = strip.strip(runs[name], tmp_path / "small")
    half = strip.strip(runs[name], tmp_path / "half", half=True)
    assert len(half) < len(whole)
    found = [module.load(tmp_path / folder)[:-1] for folder in ("small", "half")]
    full, rounded = ([p for network in networks for p in network.state_dict().values()] for networks in found)
    for a, b in zip(full, rounded, strict=True):
        torch.testing.assert_close(b, a, rtol=2**-10, atol=1e-7)  # the same type and shape, and 11 binary digits
    assert not all(torch.equal(a, b) for a, b in zip(full, rounded, strict=True))


@pytest.mark.parametrize("name, flag", [("diffusion", "--consistency"), ("flow", "--learn-inverse")])
def test_a_run_that_began_with_another_needs_it_no_more(runs, name, flag, tmp_path):
    """The folder of --init does not travel; without it what was tuned samples all the same."""
    module = importlib.import_module(name)
    tiny_run(name, tmp_path / "tuned", flag, "--init", runs[name])
    strip.strip(tmp_path / "tuned", tmp_path / "small")
    assert load_checkpoint(tmp_path / "small")["config"]["init"] is None
    whole, again = sampled(module, tmp_path / "tuned"), sampled(module, tmp_path / "small")
    np.testing.assert_array_equal(whole["images"], again["images"])


def test_settings_of_the_machine_do_not_travel(tmp_path):
    import gan

    tiny_run("gan", tmp_path / "whole", "--data-dir", tmp_path / "here")
    strip.strip(tmp_path / "whole", tmp_path / "small")
    config = load_checkpoint(tmp_path / "small")["config"]
    assert str(tmp_path) not in str(config) and config["data_dir"] == gan.Config.data_dir
    assert config["width"] == 8 and config["seed"] == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_kept_cannot_be_resumed(runs, name, tmp_path, capsys):
    module = importlib.import_module(name)
    strip.strip(runs[name], tmp_path / "small")
    before = (tmp_path / "small" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert run(module, ["--resume", "--out", tmp_path / "small", "--steps", 20]) == 2
    assert "checkpoint.pt" in error_line(capsys.readouterr().err)
    assert (tmp_path / "small" / "checkpoint.pt").read_bytes() == before


def test_a_new_run_may_begin_with_what_is_kept(runs, tmp_path, capsys):
    strip.strip(runs["gan"], tmp_path / "small")
    tiny_run("gan", tmp_path / "new", "--init", tmp_path / "small", "--steps", 1, "--lr", 1e-9)
    old = load_checkpoint(tmp_path / "small")["ema_generator"]
    for name, value in load_checkpoint(tmp_path / "new")["generator"].items():
        torch.testing.assert_close(value, old[name])


def test_a_whole_run_is_not_overwritten(runs, tmp_path):
    shutil.copytree(runs["gan"], tmp_path / "whole")
    before = (tmp_path / "whole" / "checkpoint.pt").read_bytes()
    for source in (tmp_path / "whole", runs["vae"]):
        with pytest.raises(SystemExit, match="whole run"):
            strip.strip(source, tmp_path / "whole")
    assert (tmp_path / "whole" / "checkpoint.pt").read_bytes() == before
    first = strip.strip(tmp_path / "whole", tmp_path / "small")
    assert strip.strip(tmp_path / "small", tmp_path / "small") == first  # nothing is lost


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
@pytest.mark.parametrize("tool", ["strip", "explore"])
def test_a_folder_without_a_run_is_refused(tool, content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    monkeypatch.setitem(sys.modules, "gradio", sys)  # there, as far as its import can tell
    argv = [str(tmp_path), str(tmp_path / "new")] if tool == "strip" else [str(tmp_path)]
    with pytest.raises(SystemExit, match="error: .*checkpoint.pt: no checkpoint of a run") as e:
        load_tool(tool).main(argv)
    assert "\n" not in e.value.code and not (tmp_path / "new").exists()


def test_a_run_of_another_script_is_refused(tmp_path):
    torch.save({"script": "os"}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="a script that is not here: os"):
        strip.strip(tmp_path, tmp_path / "new")


# ---- tools/explore.py


def values_of(explorer, **more):
    return {slider.name: slider.value for slider in explorer.sliders} | more


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_control_changes_the_images(explorers, name):
    explorer = explorers[name]
    values = values_of(explorer)
    samples, way = explorer.draw(explore.EVERY, **values)
    for images, most in ((samples, explore.SAMPLES), (way, explore.STRIP)):
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8) and 2 <= len(images) <= most
    assert len(samples) == explore.SAMPLES
    again, _ = explorer.draw(explore.EVERY, **values)
    assert torch.equal(samples, again)
    for slider in explorer.sliders:
        for value in (slider.low, slider.high):
            other, _ = explorer.draw(explore.EVERY, **values | {slider.name: value})
            assert value == slider.value or not torch.equal(samples, other), f"{slider.name} {value}"
    assert len(explorer.names) == explorer.classes == (0 if name == "vae" else 10)
    if explorer.classes:
        threes, _ = explorer.draw("3", **values)
        assert not torch.equal(samples, threes)
        assert torch.equal(samples[3], threes[3])  # the fourth sample is of class 3 and of the same noise in both


@pytest.mark.parametrize("name", ["vae", "gan", "flow"])
def test_temperature_0_gives_one_image(explorers, name):
    samples, way = explorers[name].draw("3" if name != "vae" else explore.EVERY, seed=1, walk=0.5, temperature=0)
    assert (samples == samples[:1]).all() and (way == samples[:1]).all()


@pytest.mark.parametrize("name", ["diffusion", "autoregressive", "vqgan"])
def test_the_strip_ends_in_the_first_sample(explorers, name):
    samples, way = explorers[name].draw("2", **values_of(explorers[name], seed=5))
    assert torch.equal(way[-1], samples[0])
    assert not torch.equal(way[0], way[-1])


@pytest.mark.parametrize("name", ["vae", "gan", "flow"])
def test_the_way_leads_from_the_first_sample_to_the_second(explorers, name):
    label = "2" if name != "vae" else explore.EVERY
    samples, way = explorers[name].draw(label, seed=5, walk=0, temperature=1.0)
    torch.testing.assert_close(way[[0, -1]].int(), samples[:2].int(), rtol=0, atol=1)  # up to rounding
    assert not torch.equal(way[4], way[0]) and not torch.equal(way[4], way[-1])
    half, same = explorers[name].draw(label, seed=5, walk=0.5, temperature=1.0)
    torch.testing.assert_close(half[0].int(), way[4].int(), rtol=0, atol=1)
    assert torch.equal(same, way)
    there, _ = explorers[name].draw(label, seed=5, walk=1, temperature=1.0)
    torch.testing.assert_close(there.int(), samples.roll(-1, 0).int(), rtol=0, atol=1)


def test_a_walk_stays_in_the_class_of_each_sample(explorers):
    """A sample that has come to the noise of the next one is drawn in its own class."""
    walked, _ = explorers["gan"].draw(explore.EVERY, seed=5, walk=1, temperature=1.0)
    ones, _ = explorers["gan"].draw("1", seed=5, walk=0, temperature=1.0)
    torch.testing.assert_close(walked[1].int(), ones[2].int(), rtol=0, atol=1)


@pytest.mark.parametrize("name", ["diffusion", "autoregressive", "vqgan"])
def test_the_slider_goes_along_the_strip(explorers, name):
    """At each place of the strip, the first of the samples is the image that the strip has there."""
    explorer = explorers[name]
    values = values_of(explorer, seed=5) | ({"nfe": 8} if name == "diffusion" else {})
    _, way = explorer.draw("2", **values)
    assert 5 <= len(way) <= explore.STRIP  # the whole chain, where it is diffusion's
    for k in range(len(way)):
        samples, _ = explorer.draw("2", **values | {explorer.way().name: k / (len(way) - 1)})
        assert torch.equal(samples[0], way[k])


def test_one_evaluation_is_a_chain_of_two(explorers):
    samples, way = explorers["diffusion"].draw(explore.EVERY, seed=0, chain=1, nfe=1, guidance=1)
    assert len(way) == 2 and torch.equal(way[-1], samples[0])


def test_samples_are_those_of_the_script(explorers, runs):
    """The same noise gives what the script's own sample gives."""
    import gan

    samples, _ = explorers["gan"].draw("7", seed=11, walk=0, temperature=0.5)
    G, _, cfg = gan.load(runs["gan"])
    torch.manual_seed(11)
    z = torch.randn(explore.SAMPLES, cfg.z_dim)
    strip = torch.stack([explore.mix(z[0], z[1], k / 8) for k in range(explore.STRIP)])
    z = torch.cat([z, strip])  # one batch, so that rounding is the same
    expected = gan.to_uint8(G(z / 2, torch.full((len(z),), 7)).clamp(-1, 1))
    assert torch.equal(samples, expected[:explore.SAMPLES])


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_mix_keeps_the_variance(weight):
    a, b = torch.randn(2, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixed = explore.mix(a, b, weight)
    assert abs(mixed.var().item() - 1) < 0.02 and abs(mixed.mean().item()) < 0.01
    torch.testing.assert_close(explore.mix(a, a, 0.5), math.sqrt(2) * a)  # of noise that is not independent it does not


@pytest.mark.parametrize(("shape", "side"), [((1, 8, 8), 2), ((3, 9, 7), 4), ((1, 5, 6), 1), ((1, 4, 4), 8)])
def test_revealed_is_the_raster_order(shape, side):
    C, H, W = shape
    image = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = explore.revealed(image, side)
    corners = [(i, j) for i in range(0, H, side) for j in range(0, W, side)]
    assert found.shape == (explore.STRIP, *shape) and found.dtype == torch.uint8
    for k, picture in enumerate(found):
        expected = torch.full(shape, 127, dtype=torch.uint8)
        for i, j in corners[:round(len(corners) * k / 8)]:
            expected[:, i:i + side, j:j + side] = image[:, i:i + side, j:j + side]
        assert torch.equal(picture, expected)


@pytest.mark.parametrize(("channels", "n"), [(1, 5), (3, 8)])
def test_picture_shows_every_image_at_its_place(channels, n):
    images = torch.randint(255, (n, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = explore.picture(images, 4)
    side = 8 * (84 // 8) + 4
    assert found.shape[:2] == (2 * side, 4 * side) and found.ndim == (2 if channels == 1 else 3)
    for k, image in enumerate(images):
        cell = found[k // 4 * side:, k % 4 * side:][2:side - 2:10, 2:side - 2:10]  # a pixel of each square of ten
        np.testing.assert_array_equal(cell.reshape(8, 8, channels), image.permute(1, 2, 0).numpy())


def test_without_gradio_one_line_says_what_to_do(runs):
    code = "import sys; sys.modules['gradio'] = None; sys.argv[0] = 'explore.py'; import explore; explore.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, str(runs["gan"])], cwd=ROOT / "tools", capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "gradio>=6"' in error_line(done.stderr) and not done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_has_the_controls_and_shows_what_draw_gives(explorers, name):
    gradio = pytest.importorskip("gradio")
    explorer = explorers[name]
    blocks = explore.page(explorer, "a run")
    sliders = [block for block in blocks.blocks.values() if isinstance(block, gradio.Slider)]
    assert [(s.minimum, s.maximum, s.value) for s in sliders] == [(s.low, s.high, s.value) for s in explorer.sliders]
    (menu,) = [block for block in blocks.blocks.values() if isinstance(block, gradio.Dropdown)]
    assert menu.visible == (name != "vae") and len(menu.choices) == 1 + explorer.classes
    values = values_of(explorer, seed=3)
    expected = explorer.draw(explore.EVERY, **values)
    functions = list(blocks.fns.values())
    assert len(functions) == 2 + len(sliders)  # of each control, and of the page when it is opened
    shown = functions[0].fn(explore.EVERY, *values.values())
    for found, images, columns in zip(shown, expected, (8, explore.STRIP), strict=True):
        np.testing.assert_array_equal(found, explore.picture(images, columns))


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="a browser that a program can steer is not here")
@pytest.mark.parametrize("width", [1280, 390])
def test_sliders_move_the_images_in_a_browser(runs, width):
    """Chromium without a window: the page fits the width, and each slider brings new samples."""
    pytest.importorskip("gradio")
    webdriver = pytest.importorskip("selenium.webdriver")
    waiting = pytest.importorskip("selenium.webdriver.support.wait")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox"):
        options.add_argument(argument)
    server = subprocess.Popen([sys.executable, ROOT / "tools/explore.py", runs["gan"], "--port", str(port)],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert "127.0.0.1" in server.stdout.readline()  # it listens
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        with webdriver.Chrome(options=options, service=service) as browser:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(f"http://127.0.0.1:{port}")
            wait = waiting.WebDriverWait(browser, 60)

            def source():
                """Of the picture of the samples, None before there is one."""
                images = browser.find_elements("css selector", "img[alt=samples]")
                return images[0].get_attribute("src") if images else None

            wait.until(lambda _: source())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            sliders = browser.find_elements("css selector", "input[type=range]")
            assert len(sliders) == 3
            for slider in sliders:
                before = source()
                slider.send_keys("\ue00f")  # page down: a tenth of the range
                slider.send_keys("\ue00e")  # page up
                slider.send_keys("\ue00e")
                wait.until(lambda _, before=before: source() != before)
    finally:
        server.kill()
