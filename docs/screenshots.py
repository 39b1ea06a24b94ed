"""Take screenshots of TensorBoard's pages over a folder of runs: `python docs/screenshots.py Logs OUT`.

Needs Chromium, its driver and selenium (Debian: chromium chromium-driver; `pip install selenium`).
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple


class Page(NamedTuple):
    """A page of TensorBoard: its plugin, its address, and texts that it shows once it is drawn."""

    plugin: str
    address: str
    texts: tuple[str, ...]
    webgl: bool = False  # the page cannot be drawn without; others are drawn faster without


PAGES = {
    "time-series": Page(
        "timeseries", "&tagFilter=epoch_(error_percent|loss)#timeseries", ("epoch_loss", "epoch_error_percent")
    ),
    "scalars": Page("scalars", "&tagFilter=final#scalars", ("final",)),
    "custom-scalars": Page("custom_scalars", "#custom_scalars", ("error, %", "learning rate")),
    "images": Page("images", "#images", ("confusion_matrix",)),
    "masks": Page("images", "&tagFilter=masks#timeseries", ("stage_1_attention_1",)),
    "graphs": Page("graphs", "#graphs", ("stage_1", "classifier")),
    "distributions": Page("distributions", "#distributions", ("stem",)),
    "histograms": Page("histograms", "#histograms", ("stem",)),
    "text": Page("text", "#text", ("recipe",)),
    "pr-curves": Page("pr_curves", "#pr_curves", ("class/0",)),
    "projector": Page("projector", "#projector", ("features before the classifier", "variance described"), webgl=True),
    "hparams": Page("hparams", "#hparams", ("test_error_percent",)),
    "profile": Page("profile", "#profile", ("Tools",)),
}
TEXT = """
const of = (node) => [...node.childNodes].map((each) =>
    (each.nodeType === 3 ? each.textContent : "") + (each.shadowRoot ? of(each.shadowRoot) : "") +
    (each.contentDocument ? of(each.contentDocument) : "") + of(each)).join(" ");
return of(document.body);
"""
CLOSE_SETTINGS = "document.querySelector('[aria-label=\"Close side pane\"]')?.click()"


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_chromium(webgl):
    """Start headless Chromium, which connects to this machine alone."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (
        "--headless=new", "--no-sandbox", "--window-size=1700,900", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking",
        *(("--use-angle=swiftshader", "--enable-unsafe-swiftshader") if webgl else ("--disable-gpu",)),
    ):  # fmt: skip
        options.add_argument(option)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def wait_for(condition, what, seconds=180):
    """Call a function until it returns something true; a page that is not there yet may raise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{what} did not appear within {seconds} s")


def choose_pages(address, names):
    """Return `{name: page}` of the named pages, or of all, for which the server at `address` has data."""
    for _ in range(10):  # the projector looks for its data in the background
        listing = json.loads(urllib.request.urlopen(f"{address}data/plugins_listing").read())
        empty = [name for name in names or PAGES if not listing.get(PAGES[name].plugin, {}).get("enabled")]
        if not empty:
            break
        time.sleep(1)
    if empty and names:
        raise SystemExit(f"{sys.argv[0]}: error: the runs have no data for {', '.join(empty)}")
    if empty:
        print(f"no data for {', '.join(empty)}")
    return {name: page for name, page in PAGES.items() if name in (names or PAGES) and name not in empty}


def take_screenshots(logs, output, names=()):
    """Write `<output>/tensorboard-<page>.png` for the named pages, or for all that have data.

    Returns:
        `{page: text on it}`.
    """
    address = f"http://127.0.0.1:{find_free_port()}/"
    command = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", address.split(":")[-1][:-1],
        "--samples_per_plugin", "images=100",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    texts = {}
    try:
        wait_for(lambda: b"final/" in urllib.request.urlopen(f"{address}data/plugin/scalars/tags").read(), "a run")
        pages = choose_pages(address, names)
        for webgl in (False, True):
            chosen = {name: page for name, page in pages.items() if page.webgl == webgl}
            if chosen:
                texts |= take_in_browser(address, output, chosen, webgl)
    finally:
        server.terminate()
        server.wait()
    return texts


def take_in_browser(address, output, pages, webgl):
    """Take the screenshots of these pages of the server at `address`; see `take_screenshots`."""
    browser, texts = start_chromium(webgl), {}
    try:
        for name, page in pages.items():
            browser.get("about:blank")
            browser.get(f"{address}?darkMode=false{page.address}")
            wait_for(lambda page=page: all(text in browser.execute_script(TEXT) for text in page.texts), name)
            browser.execute_script(CLOSE_SETTINGS)
            time.sleep(6)  # charts and pictures are drawn after their names
            texts[name] = browser.execute_script(TEXT)
            browser.save_screenshot(str(Path(output) / f"tensorboard-{name}.png"))
    finally:
        browser.quit()
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", help="a folder of runs")
    parser.add_argument("output", help="the folder that gets the pictures")
    parser.add_argument("--pages", nargs="+", choices=tuple(PAGES), default=(), help="(default: all that have data)")
    options = parser.parse_args()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    for name in take_screenshots(options.logs, options.output, options.pages):
        print(f"{options.output}/tensorboard-{name}.png")


if __name__ == "__main__":
    main()
