"""Screenshots of TensorBoard's pages over a folder of runs: `python docs/screenshots.py Logs OUT`.

Needs Chromium, its driver and selenium (Debian: chromium chromium-driver; `pip install selenium`).
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# A page's address, and words that stand on it when it is drawn.
PAGES = {
    "scalars": ("&tagFilter=epoch_(acc|loss)#timeseries", ("epoch_loss",)),
    "images": ("#images", ("confusion_matrix",)),
    "graphs": ("#graphs", ("stage_1_unit",)),
    "hparams": ("#hparams", ("test_error_percent",)),
}
TEXT = """
const of = (node) => [...node.childNodes].map((each) =>
    (each.nodeType === 3 ? each.textContent : "") + (each.shadowRoot ? of(each.shadowRoot) : "") + of(each)).join(" ");
return of(document.body);
"""
CLOSE_SETTINGS = "document.querySelector('[aria-label=\"Close side pane\"], .settings-button')?.click()"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def chromium():
    """Headless Chromium; quiet, offline but for the loopback."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1700,900", "--hide-scrollbars",
                 "--no-first-run", "--disable-background-networking"):  # fmt: skip
        options.add_argument(word)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def wait_for(condition, seconds=90):
    """Ask until the answer is true; a page that is not there yet may raise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"nothing came within {seconds} s")


def take(logs, output, pages=PAGES):
    """Write `<output>/tensorboard-<page>.png` for each page; returns the texts that stood on them."""
    address = f"http://127.0.0.1:{free_port()}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", address.split(":")[-1][:-1],
               "--samples_per_plugin", "images=100"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    browser, texts = chromium(), {}
    try:
        wait_for(lambda: b"epoch_loss" in urllib.request.urlopen(f"{address}data/plugin/scalars/tags").read())
        for name, (place, words) in pages.items():
            browser.get("about:blank")
            browser.get(f"{address}?darkMode=false{place}")
            wait_for(lambda words=words: all(word in browser.execute_script(TEXT) for word in words))
            browser.execute_script(CLOSE_SETTINGS)
            time.sleep(4)  # charts and pictures are drawn after their names
            texts[name] = browser.execute_script(TEXT)
            browser.save_screenshot(str(Path(output) / f"tensorboard-{name}.png"))
    finally:
        browser.quit()
        server.terminate()
        server.wait()
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", help="a folder of runs")
    parser.add_argument("output", help="the folder that gets the pictures")
    words = parser.parse_args()
    Path(words.output).mkdir(parents=True, exist_ok=True)
    for name in take(words.logs, words.output):
        print(f"{words.output}/tensorboard-{name}.png")


if __name__ == "__main__":
    main()
