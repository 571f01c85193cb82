"""Downloads that fail in every way: servers on this machine that break off, stay silent, refuse or send something else."""

import contextlib
import gzip
import hashlib
import http.server
import importlib
import os
import signal
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from tiny import SCRIPTS, Child, error_line

p = importlib.import_module(SCRIPTS[0])  # the plumbing is the same in all of them, as tests/test_plumbing.py says

rng = np.random.RandomState(0)
IMAGES = [rng.randint(0, 256, (n, 28, 28)).astype(np.uint8) for n in (20, 10)]  # noise: gzip cannot shorten it
LABELS = [rng.randint(0, 10, n).astype(np.uint8) for n in (20, 10)]
CONTENT = dict(zip(p.SHA256["mnist"], (struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape) + a.tobytes()
                                 for pair in zip(IMAGES, LABELS, strict=True) for a in pair), strict=True))
PACKED = {f"{file}.gz": gzip.compress(raw, mtime=0) for file, raw in CONTENT.items()}
HASHES = {file: hashlib.sha256(raw).hexdigest() for file, raw in CONTENT.items()}
HTML = b"<!DOCTYPE html><html><body>Please sign in to the network of this hotel</body></html>"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, file = self.server, self.path.split("/")[-1]
        server.asked.append(file)
        content = PACKED[file]
        self.close_connection = True
        half = content[:len(content) // 2]
        with contextlib.suppress(OSError):  # the other side may have given up
            getattr(self, f"do_{server.fault}")(content, half)

    def head(self, code=200, length=None, **more):
        self.send_response(code)
        for name, value in (more | ({} if length is None else {"Content-Length": length})).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_none(self, content, half):
        self.head(length=len(content))
        self.wfile.write(content)

    def do_breaks_off(self, content, half):
        self.head(length=len(content))
        self.wfile.write(half)

    def do_breaks_off_with_no_length(self, content, half):
        self.head()
        self.wfile.write(half)

    def do_breaks_off_in_a_chunk(self, content, half):
        self.head(Transfer_Encoding="chunked")
        self.wfile.write(b"%x\r\n%b\r\n%x\r\n" % (len(half), half, 999))

    def do_half_a_file(self, content, half):
        self.head(length=len(half))
        self.wfile.write(half)

    def do_silence(self, content, half):
        self.server.over.wait(60)

    def do_silence_midway(self, content, half):
        self.head(length=len(content))
        self.wfile.write(half)
        self.wfile.flush()
        self.server.over.wait(60)

    def do_403(self, content, half):
        self.head(403, len(HTML))
        self.wfile.write(HTML)

    def do_404(self, content, half):
        self.head(404, 0)

    def do_500(self, content, half):
        self.head(500, 0)

    def do_zero_bytes(self, content, half):
        self.head(length=0)

    def do_html(self, content, half):
        self.head(length=len(HTML), Content_Type="text/html")
        self.wfile.write(HTML)

    def do_packed_html(self, content, half):
        self.do_none(gzip.compress(HTML), None)

    def do_one_bit_off(self, content, half):
        raw = bytearray(gzip.decompress(content))
        raw[-1] ^= 1
        self.do_none(gzip.compress(bytes(raw)), None)

    def do_one_bit_off_in_the_archive(self, content, half):
        raw = bytearray(content)
        raw[len(raw) // 2] ^= 1
        self.do_none(bytes(raw), None)

    def do_closes_at_once(self, content, half):
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_speaks_no_http(self, content, half):
        self.wfile.write(b"\x00\x01SSH-2.0\r\n\r\n")

    def do_odd_headers(self, content, half):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: lots\r\n\r\n")

    def do_redirects_for_ever(self, content, half):
        self.head(302, 0, Location=self.path)

    def do_redirects_nowhere(self, content, half):
        self.head(302, 0, Location="http://[nowhere/")

    def log_message(self, *args):
        pass


class Mirror(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def __init__(self, fault):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.asked, self.over = fault, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


FAULTS = [name[3:] for name in vars(Handler) if name.startswith("do_") and name not in ("do_GET", "do_none")]


@pytest.fixture
def mirrors(monkeypatch):
    """mirrors(fault, ...): the mirrors of MNIST are servers with these faults, "none" being a good one."""
    monkeypatch.setenv("no_proxy", "*")
    running = []
    urlopen = p.urlopen
    monkeypatch.setitem(p.SHA256, "mnist", HASHES)
    monkeypatch.setattr(p, "TIMEOUT", 60)

    def soon(url, timeout):
        """Of a mirror that is silent for good half a second is enough; others may be slow on a crowded machine."""
        silent = any(m.fault.startswith("silence") and url.startswith(m.url) for m in running)
        return urlopen(url, timeout=timeout / 120 if silent else timeout)
    monkeypatch.setattr(p, "urlopen", soon)

    def start(*faults):
        running.extend(Mirror(fault) for fault in faults)
        monkeypatch.setitem(p.MIRRORS, "mnist", tuple(m.url for m in running))
        return running

    yield start
    for mirror in running:
        mirror.over.set()
        mirror.shutdown()
        mirror.server_close()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    for name in ("socket.getaddrinfo", "socket.socket.connect", "socket.create_connection"):
        monkeypatch.setattr(name, refuse)


@pytest.fixture
def offline(monkeypatch):
    """What a machine without a network says."""
    def fail(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr("socket.getaddrinfo", fail)


def files(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_whole(data):
    for got, want in zip(data[:4], (IMAGES[0], LABELS[0], IMAGES[1], LABELS[1]), strict=True):
        assert torch.equal(got.squeeze(), torch.from_numpy(want).to(got.dtype))


def refused(data_dir, capsys, name="mnist"):
    with pytest.raises(SystemExit) as e:
        p.load_data(name, str(data_dir))
    assert e.value.code not in (0, None)
    return error_line(capsys.readouterr().err)


def test_a_good_mirror(mirrors, tmp_path):
    good, unused = mirrors("none", "none")
    assert_whole(p.load_data("mnist", str(tmp_path)))
    assert files(tmp_path) == {f"mnist/{file}": content for file, content in PACKED.items()}
    assert good.asked == list(PACKED) and unused.asked == []
    assert_whole(p.load_data("mnist", str(tmp_path)))  # the second time from the disk
    assert len(good.asked) == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_mirror_is_asked(fault, mirrors, tmp_path, capsys):
    bad, good = mirrors(fault, "none")
    assert_whole(p.load_data("mnist", str(tmp_path)))
    assert set(bad.asked) == set(good.asked) == set(PACKED)
    assert files(tmp_path) == {f"mnist/{file}": content for file, content in PACKED.items()}
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_no_mirror_is_good(fault, mirrors, tmp_path, capsys):
    """One line that names every place that was tried, where to put the file and what needs no network; no file."""
    bad = mirrors(fault, "500")
    line = refused(tmp_path, capsys)
    file = next(iter(PACKED))
    assert all(mirror.url + file in line for mirror in bad)
    assert str(tmp_path / "mnist") in line and "--dataset digits" in line
    assert files(tmp_path) == {}


@pytest.mark.parametrize("fault, word", [("403", "403"), ("404", "404"), ("500", "500"), ("silence", "timed out"),
                                         ("one_bit_off", "SHA-256"), ("zero_bytes", "SHA-256")])
def test_the_reason_is_named(fault, word, mirrors, tmp_path, capsys):
    mirrors(fault)
    assert word in refused(tmp_path, capsys)


def test_what_came_before_the_fault_is_kept(mirrors, tmp_path, capsys, monkeypatch):
    """A mirror that dies after two files: those two are whole and are not asked for again."""
    (mirror,) = mirrors("none")
    monkeypatch.setattr(Handler, "do_none", lambda self, content, half, good=Handler.do_none: (
        good if len(self.server.asked) <= 2 else Handler.do_500)(self, content, half))
    refused(tmp_path, capsys)
    done = list(PACKED)[:2]
    assert files(tmp_path) == {f"mnist/{file}": PACKED[file] for file in done}
    monkeypatch.undo()


@pytest.mark.parametrize("packed", [True, False])
def test_offline_with_the_files_there(packed, tmp_path, monkeypatch, no_network, mirrors):
    mirrors()
    (tmp_path / "mnist").mkdir()
    for file, raw in CONTENT.items():
        (tmp_path / "mnist" / (f"{file}.gz" if packed else file)).write_bytes(PACKED[f"{file}.gz"] if packed else raw)
    before = files(tmp_path)
    assert_whole(p.load_data("mnist", str(tmp_path)))
    assert files(tmp_path) == before


def test_debians_package_is_looked_at(tmp_path, monkeypatch, no_network, mirrors):
    mirrors()
    monkeypatch.setitem(p.SHA256, "fashion_mnist", p.SHA256["mnist"])
    debian, here = Path("/usr/share/datasets/fashion-mnist"), tmp_path / "system"
    here.mkdir()
    for file, content in PACKED.items():
        (here / file).write_bytes(content)
    exists, urlopen = Path.exists, p.urlopen
    monkeypatch.setattr(Path, "exists", lambda self: exists(here / self.name if self.parent == debian else self))
    monkeypatch.setattr(p, "urlopen", lambda url, **more: urlopen(url.replace(debian.as_uri(), here.as_uri()), **more))
    assert_whole(p.load_data("fashion_mnist", str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("spoilt", ["ours", "torchvision's"])
def test_a_good_copy_of_torchvision_beside_a_spoilt_one(spoilt, tmp_path, no_network, mirrors):
    """Whichever of the two is whole is taken; what others have put there is never written to."""
    mirrors()
    folders = {"ours": tmp_path / "mnist", "torchvision's": tmp_path / "MNIST" / "raw"}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        for file, raw in CONTENT.items():
            (folder / file).write_bytes(raw[:-1] if name == spoilt else raw)
    before = files(tmp_path)
    assert_whole(p.load_data("mnist", str(tmp_path)))
    assert files(tmp_path) == before


def test_a_spoilt_copy_of_torchvision_is_left_and_a_good_one_downloaded(mirrors, tmp_path):
    (mirror,) = mirrors("none")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for file, raw in CONTENT.items():
        (tmp_path / "MNIST" / "raw" / file).write_bytes(raw[:-1])
    before = files(tmp_path)
    assert_whole(p.load_data("mnist", str(tmp_path)))
    assert mirror.asked == list(PACKED)
    assert files(tmp_path) == before | {f"mnist/{file}": content for file, content in PACKED.items()}


def test_files_on_a_disk_that_cannot_be_written_to(tmp_path, no_network, mirrors, monkeypatch):
    test_offline_with_the_files_there(True, tmp_path, monkeypatch, no_network, mirrors)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", refuse)
    monkeypatch.setattr("os.mkdir", refuse)
    assert_whole(p.load_data("mnist", str(tmp_path)))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_offline_without_the_files(name, tmp_path, capsys, offline):
    line = refused(tmp_path / "data", capsys, name)
    file = "cifar-10-binary.tar.gz" if name == "cifar10" else "train-images-idx3-ubyte.gz"
    assert all(mirror + file in line for mirror in p.MIRRORS[name])
    assert str(tmp_path / "data" / name) in line and "--dataset digits" in line and "name resolution" in line
    assert not files(tmp_path)


def test_connection_refused(tmp_path, capsys, mirrors, monkeypatch):
    mirrors()
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}/"
        monkeypatch.setitem(p.MIRRORS, "mnist", (url,))
        assert url in refused(tmp_path, capsys)
    assert files(tmp_path) == {}


SPOILT = {
    "truncated": lambda good: good[:len(good) // 2],
    "truncated by a byte": lambda good: good[:-1],
    "zero bytes": lambda good: b"",
    "html": lambda good: HTML,
    "another data set": lambda good: gzip.compress(b"something else"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_file_on_the_disk_is_replaced_by_a_good_one(spoil, mirrors, tmp_path):
    (mirror,) = mirrors("none")
    p.load_data("mnist", str(tmp_path))
    file = list(PACKED)[2]
    (tmp_path / "mnist" / file).write_bytes(spoil(PACKED[file]))
    mirror.asked.clear()
    assert_whole(p.load_data("mnist", str(tmp_path)))
    assert mirror.asked == [file] and files(tmp_path)[f"mnist/{file}"] == PACKED[file]


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_file_on_the_disk_is_named_offline(spoil, mirrors, tmp_path, capsys, offline):
    mirrors()
    (tmp_path / "mnist").mkdir()
    for file, content in PACKED.items():
        (tmp_path / "mnist" / file).write_bytes(content)
    path = tmp_path / "mnist" / list(PACKED)[1]
    path.write_bytes(spoil(PACKED[path.name]))
    before = files(tmp_path)
    line = refused(tmp_path, capsys)
    assert str(path) in line and "--dataset digits" in line
    assert files(tmp_path) == before  # nothing is lost


def test_a_good_unpacked_file_beside_a_spoilt_packed_one(mirrors, tmp_path, no_network):
    mirrors()
    (tmp_path / "mnist").mkdir()
    for file, raw in CONTENT.items():
        (tmp_path / "mnist" / file).write_bytes(raw)
        (tmp_path / "mnist" / f"{file}.gz").write_bytes(PACKED[f"{file}.gz"][:30])
    assert_whole(p.load_data("mnist", str(tmp_path)))


def test_a_folder_under_the_name_of_the_file(mirrors, tmp_path, capsys):
    mirrors("none")
    (tmp_path / "mnist" / next(iter(PACKED))).mkdir(parents=True)
    line = refused(tmp_path, capsys)
    assert str(tmp_path / "mnist" / next(iter(PACKED))) in line
    assert files(tmp_path) == {}


def test_a_data_dir_that_cannot_be_made(mirrors, tmp_path, capsys):
    mirrors("none")
    (tmp_path / "file").write_text("")
    line = refused(tmp_path / "file" / "data", capsys)
    assert str(tmp_path / "file" / "data" / "mnist") in line


def test_the_disk_is_full(mirrors, tmp_path, capsys, monkeypatch):
    mirrors("none")
    real = open

    def full(path, *args, **kwargs):
        f = real(path, *args, **kwargs)
        if str(path).startswith(str(tmp_path)) and "w" in args[0]:
            f.close()
            f = real("/dev/full", "wb", buffering=0)
        return f

    monkeypatch.setattr("builtins.open", full)
    line = refused(tmp_path, capsys)
    assert "No space left" in line and str(tmp_path / "mnist") in line
    assert files(tmp_path) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_during_a_download(number, mirrors, tmp_path, monkeypatch, capsys):
    """One line, the exit code of the signal, no file, and no mirror more is asked."""
    (first, second) = mirrors("none", "none")

    class Bar(p.tqdm):
        def update(self, n=1):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(p, "tqdm", Bar)
    with pytest.raises(SystemExit) as e, tiny.handlers_kept():
        p.launch(lambda: p.load_data("mnist", str(tmp_path)))
    assert e.value.code == 128 + number
    assert f"stopped by {number.name}" in error_line(capsys.readouterr().err)
    assert files(tmp_path) == {} and len(first.asked) == 1 and second.asked == []


def test_the_size_of_a_mirrors_answer_is_not_believed(mirrors, tmp_path, monkeypatch):
    """A length that is too large or too small: the hash decides."""
    def lies(self, content, half):
        self.head(length=len(content) + 99)
        self.wfile.write(content)

    monkeypatch.setattr(Handler, "do_none", lies)
    mirrors("none")
    assert_whole(p.load_data("mnist", str(tmp_path)))
    assert files(tmp_path) == {f"mnist/{file}": content for file, content in PACKED.items()}


def load_from(urls, data_dir):
    p.MIRRORS["mnist"], p.SHA256["mnist"] = urls, HASHES
    p.TIMEOUT = 60
    p.load_data("mnist", data_dir)


def test_kill_during_a_download(mirrors, tmp_path):
    """Nothing is written before all has come and is known to be good."""
    first, second = mirrors("silence_midway", "none")
    child = Child(tmp_path / "child", load_from, (first.url,), str(tmp_path / "data"), env={"no_proxy": "*"})
    assert child.wait_for(lambda: first.asked)
    assert child.kill() == -signal.SIGKILL
    assert files(tmp_path / "data") == {}
    assert_whole(p.load_data("mnist", str(tmp_path / "data")))
    assert files(tmp_path / "data") == {f"mnist/{file}": content for file, content in PACKED.items()}


def test_processes_that_download_at_the_same_time(mirrors, tmp_path):
    (mirror,) = mirrors("none")
    children = [Child(tmp_path / f"child{i}", load_from, (mirror.url,), str(tmp_path / "data"), env={"no_proxy": "*"})
                for i in range(3)]
    for child in children:
        assert child.join() == 0, child.stderr
    assert files(tmp_path / "data") == {f"mnist/{file}": content for file, content in PACKED.items()}


@pytest.mark.parametrize("fault", ["breaks_off", "one_bit_off_in_the_archive"])
def test_the_archive_of_cifar10(fault, mirrors, tmp_path, capsys, monkeypatch):
    """Checked before anything is unpacked from it."""
    file, (archive, rows) = "cifar-10-binary.tar.gz", tiny.cifar10_archive()
    monkeypatch.setitem(PACKED, file, archive)
    monkeypatch.setitem(p.SHA256, "cifar10", {file: hashlib.sha256(archive).hexdigest()})
    bad, good = mirrors(fault, "none")
    monkeypatch.setitem(p.MIRRORS, "cifar10", (bad.url,))
    assert bad.url + file in refused(tmp_path, capsys, "cifar10")
    assert files(tmp_path) == {}
    monkeypatch.setitem(p.MIRRORS, "cifar10", (bad.url, good.url))
    assert p.load_data("cifar10", str(tmp_path)).test_labels.tolist() == rows[50_000:, 0].tolist()
    assert list(files(tmp_path)) == [f"cifar10/{file}"]


def test_the_binary_archive_is_downloaded_beside_the_pickles(mirrors, tmp_path, monkeypatch):
    """Who has cifar-10-python.tar.gz and a network gets the archive that can be read."""
    file, (archive, rows) = "cifar-10-binary.tar.gz", tiny.cifar10_archive()
    monkeypatch.setitem(PACKED, file, archive)
    monkeypatch.setitem(p.SHA256, "cifar10", {file: hashlib.sha256(archive).hexdigest()})
    (good,) = mirrors("none")
    monkeypatch.setitem(p.MIRRORS, "cifar10", (good.url,))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"pickles")
    assert p.load_data("cifar10", str(tmp_path)).test_labels.tolist() == rows[50_000:, 0].tolist()
    assert files(tmp_path) == {"cifar-10-python.tar.gz": b"pickles", f"cifar10/{file}": archive}
