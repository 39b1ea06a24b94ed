"""Debian's Chromium, driven by selenium; tests that need it are skipped if it is missing."""

import contextlib
import json
import shutil
import socket
from urllib.parse import urlsplit

import pytest

SWITCHES = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking"


def require_browser():
    """Skip the test, with the reason, if Chromium, its driver or selenium is not installed."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (Debian: chromium, chromium-driver)")


@contextlib.contextmanager
def open_chromium(width=1300, height=900):
    """Open headless Chromium, which records its network requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in (*SWITCHES.split(), f"--window-size={width},{height}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def read_hosts(browser):
    """Return the hosts of the browser's requests since the last call, without `data:` and `blob:` addresses."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
    return {urlsplit(url).hostname for url in urls if not url.startswith(("data:", "blob:", "chrome:", "about:"))}


def find_free_port():
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
