"""page.py shows the output of the network in Chromium and serves this machine only; errors are one line."""

import base64
import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

import page
from tests.support import browser
from tests.support.tiny import tiny_network
from Training.errors import InputError
from Training.visual import inspection, plots

NAMES = [f"class {letter} <b>" for letter in "abcdefghij"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two runs, ARL and NAL, their networks, and a picture of their size."""
    folder = tmp_path_factory.mktemp("runs")
    networks = {}
    for learning in ("arl", "nal"):
        keras.utils.set_random_seed(7)
        networks[learning] = tiny_network(learning=learning)
        (folder / learning).mkdir()
        networks[learning].save(folder / learning / "last.keras")
        (folder / learning / "classes.json").write_text(json.dumps(NAMES))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "picture.png")
    return SimpleNamespace(folder=folder, networks=networks, image=image, picture=folder / "picture.png")


def png_in(text):
    """Return the pixels of the PNG in a `data:` address."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.split("base64,")[1]))))


@pytest.mark.parametrize("learning", ["arl", "nal"])
def test_a_look_is_the_output_of_the_network(runs, learning):
    network = runs.networks[learning]
    shown = page.prepare(network, NAMES, "run")
    assert shown.title == f"{learning.upper()}: run" and shown.size == (32, 32)
    (seen,) = page.look_at_file([shown], "picture.png", runs.picture.read_bytes())
    np.testing.assert_array_equal(seen.image, runs.image)
    np.testing.assert_allclose(seen.probabilities, network(runs.image[None], training=False)[0], rtol=1e-4)
    (name,) = seen.branches
    both = inspection.make_branch_model(network)(runs.image[None], training=False)[name]
    for key in ("trunk", "mask"):
        np.testing.assert_allclose(seen.branches[name][key], both[key][0], rtol=1e-4, atol=1e-5)

    trunk, mask = (seen.branches[name][key] for key in ("trunk", "mask"))
    after = (mask + (learning == "arl")) * trunk
    for channel, expected in ((0, after.mean(axis=-1)), (3, after[..., 2])):
        picture, low, high = page.draw_maps(seen, name, learning, channel, 0.5)["after"]
        np.testing.assert_array_equal(picture, plots.color_heat(plots.rescale(expected)))
        assert (low, high) == (expected.min(), expected.max())
    clear = page.draw_maps(seen, name, learning, 1, 0.0)["mask"][0]  # without a mask over it: the picture in grey
    large = Image.fromarray(plots.enlarge(runs.image[None], 5)[0])
    np.testing.assert_array_equal(clear, np.asarray(large.convert("L").convert("RGB")))


@pytest.mark.backends
def test_a_compiled_network_shows_the_same(runs):
    network = runs.networks["nal"]
    shown = page.prepare(network, NAMES, "run")
    page.compile_network(shown)
    assert shown.compiled
    given, image = page.look(shown, runs.image), runs.image[None]
    np.testing.assert_allclose(given.probabilities, network.predict(image, verbose=0)[0], rtol=1e-4, atol=1e-5)
    ((name, both),) = inspection.make_branch_model(network).predict(image, verbose=0).items()
    for key in ("trunk", "mask"):
        np.testing.assert_allclose(given.branches[name][key], both[key][0], rtol=1e-4, atol=1e-4)


def test_maps_are_html_for_any_network(runs):
    shown = page.prepare(runs.networks["arl"], None, "run")
    assert shown.classes == [str(i) for i in range(10)]
    (seen,) = page.look_at_file([shown], "picture.png", runs.picture.read_bytes())
    text = page.format_maps(shown, seen, 1, 99, 0.6)  # more channels than the block has: its last
    sources = re.findall(r'src="([^"]+)"', text)
    assert [png_in(each).shape for each in sources] == [(160, 160, 3), (8, 8, 3), (8, 8, 3)]
    assert text.count("<figure>") == text.count('class="scale"') == 3 and "8 channels" in text
    assert page.format_maps(shown, None, 1, 0, 0.6).count("<") == 0
    assert page.format_maps(shown, seen, 2, 0, 0.6) == "No block 2: this network has 1."
    assert page.count_channels([shown, shown], 1) == 8


def test_invalid_options_end_in_one_line(tmp_path, capsys):
    images = keras.Input((8, 8, 3))
    flat = keras.layers.Flatten()(images)
    keras.Model(images, keras.layers.Dense(10, "softmax")(flat)).save(tmp_path / "last.keras")
    with socket.socket() as taken:
        taken.bind((page.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [
            (["--port", "0"], "--port must be between 1 and 65535, received 0"),
            (["--model", "nowhere"], "nowhere does not exist"),
            (
                ["--model", str(tmp_path), "--port", str(port)],
                f"--port {port} cannot be used: Address already in use; choose another",
            ),
            (["--models", "x"], "did you mean --model?"),
        ]
        for arguments, expected in cases:
            with pytest.raises(SystemExit) as stop:
                page.main(arguments)
            err = capsys.readouterr().err
            assert stop.value.code == 2 and err.startswith("page.py: error: ") and err.count("\n") == 1
            assert expected in err
    with pytest.raises(InputError, match="dense has no attention blocks"):
        page.load_networks(["dense"], [tmp_path / "last.keras"])


def test_the_process_that_computes_sends_looks_and_errors(runs):
    """`serve_networks`, in a thread, through the connection that the page has to it."""
    ours, others = multiprocessing.Pipe()
    path = runs.folder / "nal" / "last.keras"
    thread = threading.Thread(target=page.serve_networks, args=(others, ["run"], [path]))
    thread.start()
    (network,), photographs, (first,) = ours.recv()
    assert network.view is None and network.title == "NAL: run" and network.classes == NAMES
    assert first.probabilities.sum() == pytest.approx(1, abs=1e-4) and len(photographs) == 4
    ours.send(("picture.png", runs.picture.read_bytes()))
    (seen,) = ours.recv()
    given = runs.networks["nal"](runs.image[None], training=False)[0]
    np.testing.assert_allclose(seen.probabilities, given, rtol=1e-4, atol=1e-5)
    ours.send(("picture.png", runs.picture.read_bytes()[:99]))
    error = ours.recv()
    assert isinstance(error, InputError) and "picture.png cannot be read" in str(error)
    ours.close()
    thread.join(60)
    assert not thread.is_alive()

    images = keras.Input((8, 8, 3))
    keras.Model(images, keras.layers.Dense(10, "softmax")(keras.layers.Flatten()(images))).save(runs.folder / "d.keras")
    ours, others = multiprocessing.Pipe()
    page.serve_networks(others, ["dense"], [runs.folder / "d.keras"])
    assert "dense has no attention blocks" in str(ours.recv())


def test_a_process_that_ended_is_one_line():
    process = page.NetworkProcess.__new__(page.NetworkProcess)
    process.connection, other = multiprocessing.Pipe()
    process.lock, process.process = threading.Lock(), SimpleNamespace(join=lambda: None, exitcode=-9)
    other.close()
    with pytest.raises(InputError, match="the process that computes has ended with code -9"):
        process.ask("picture.png", b"")


def test_settings_for_other_pages_are_dropped(monkeypatch):
    environment = {**os.environ, "GRADIO_SHARE": "True", "HTTP_PROXY": "http://proxy.example:3128"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setitem(sys.modules, "gradio", None)  # not installed
    with pytest.raises(InputError, match="install requirements-page.txt"):
        page.import_gradio()
    assert "GRADIO_SHARE" not in environment and environment["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert environment["NO_PROXY"] == page.HOST


@pytest.fixture
def served(runs, tmp_path):
    """A process that serves the page for both networks, its address, and the folder of its temporary files."""
    if not importlib.util.find_spec("gradio"):
        pytest.skip("gradio is not installed: requirements-page.txt")
    browser.require_browser()
    port = browser.find_free_port()
    models = [str(runs.folder / learning) for learning in ("arl", "nal")]
    process = subprocess.Popen(
        [sys.executable, "page.py", "--model", *models, "--port", str(port)],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path), "GRADIO_SERVER_NAME": "0.0.0.0"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = process.stdout.readline()  # limited only by the timeout of the test
        assert line == f"http://127.0.0.1:{port} (only on this machine; Ctrl-C ends it)\n", process.stderr.read()
        yield SimpleNamespace(process=process, address=line.split()[0], port=port, temporary=tmp_path)
    finally:
        process.kill()
        process.wait()


def wait_for(condition, seconds=120):
    """Wait until `condition` returns something true, and return it; elements that are being replaced are retried."""
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except (NoSuchElementException, StaleElementReferenceException):
            pass
        time.sleep(0.05)
    raise TimeoutError(f"nothing came within {seconds} s")


class Driver:
    """Actions on the page, and its content."""

    def __init__(self, chromium):
        self.chromium = chromium

    def find(self, selector):
        return self.chromium.find_element("css selector", selector)

    def sources(self, column=0):
        images = self.chromium.find_elements("css selector", f"#maps-{column} img")
        return [image.get_attribute("src") for image in images]

    def upload(self, path):
        self.find("#upload input[type=file]").send_keys(str(path))

    def press(self, slider, keys):
        self.find(f"#{slider} input[type=range]").send_keys(keys)


def test_the_page_in_a_browser(runs, served):
    from selenium.webdriver.common.keys import Keys

    with browser.open_chromium() as chromium:
        driver = Driver(chromium)
        chromium.get(served.address)
        wait_for(lambda: len(driver.sources(0)) == len(driver.sources(1)) == 3)
        assert driver.find("#message").text == "temple"

        driver.upload(runs.picture)
        wait_for(lambda: driver.find("#message").text == "picture.png")
        for column, (learning, network) in enumerate(runs.networks.items()):
            shares = network.predict(runs.image[None], verbose=0)[0]
            text = driver.find(f"#classes-{column}").text
            assert learning.upper() in text and text.count("%") == 5
            assert NAMES[shares.argmax()] in text  # with its <b>, as it stands

        opaque = driver.sources()
        driver.press("opacity", Keys.HOME)
        grey = np.asarray(Image.fromarray(runs.image).convert("L").convert("RGB"))  # the picture without a mask
        wait_for(lambda: (png_in(driver.sources()[0])[::5, ::5] == grey).all())
        assert driver.sources()[1:] == opaque[1:]
        driver.press("channel", Keys.ARROW_RIGHT)
        wait_for(lambda: driver.sources()[1] != opaque[1])

        broken = runs.folder / "<img src=x>.png"
        broken.write_bytes(runs.picture.read_bytes()[:99])
        driver.upload(broken)
        message = wait_for(lambda: driver.find("#message .error").text)
        assert "cannot be read" in message and "\n" not in message
        assert driver.sources() == []  # nothing is left of the picture before
        driver.find(".thumbnail-lg, .gallery-item button").click()
        wait_for(lambda: len(driver.sources()) == 3)
        assert browser.read_hosts(chromium) == {"127.0.0.1"}
        severe = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
        assert not severe, severe

    request = urllib.request.Request(served.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    listening = Path("/proc/net/tcp").read_text().splitlines()
    assert [line.split()[1] for line in listening if f":{served.port:04X} 00000000:0000" in line] == [
        f"0100007F:{served.port:04X}"
    ]

    served.process.stdout.close()  # as a closed terminal does
    served.process.send_signal(signal.SIGINT)
    assert (served.process.wait(120), served.process.stderr.read()) == (0, "\nStopped.\n")
    assert not list(served.temporary.glob("page-*"))
