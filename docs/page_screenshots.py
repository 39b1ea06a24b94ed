"""Screenshots of page.py's page, at desktop and phone width, light and dark: `python -m docs.page_screenshots PICTURE`.

Writes `docs/page-<width>-<theme>.png`. Needs requirements-page.txt, Chromium, its driver and selenium. Options after
the picture are passed to page.py.
"""

import base64
import io
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from tests.support.browser import find_free_port, open_chromium

WIDTHS = {"desktop": (1300, 720), "phone": (390, 844)}
FOLDER = Path(__file__).parent


def take(chromium, address, picture, width, theme):
    """Return a screenshot of the whole page with the answers for a picture, as a Pillow image."""
    sides = dict(zip(("width", "height"), WIDTHS[width]))
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**sides, "deviceScaleFactor": 1, "mobile": width == "phone"}
    )
    wanted = {"name": "prefers-color-scheme", "value": theme}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wanted]})
    chromium.get(address)
    chromium.implicitly_wait(60)
    chromium.find_element("css selector", "#maps-0 img")
    chromium.find_element("css selector", "#upload input[type=file]").send_keys(str(picture.resolve()))
    end = time.monotonic() + 60
    while chromium.find_element("css selector", "#message").text != picture.name and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(2)  # for what moves
    height = chromium.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": sides["width"], "height": height, "scale": 1}
    shot = chromium.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"])))


def main():
    if len(sys.argv) < 2:
        raise SystemExit("a picture is required: python -m docs.page_screenshots PICTURE [OPTION OF page.py ...]")
    port = str(find_free_port())
    command = [sys.executable, "page.py", "--port", port, *sys.argv[2:]]
    with subprocess.Popen(command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split(" ")[0]
        try:
            for width in WIDTHS:
                for theme in ("light", "dark") if address else ():
                    with open_chromium(*WIDTHS[width]) as chromium:
                        shot = take(chromium, address, Path(sys.argv[1]), width, theme)
                    path = FOLDER / f"page-{width}-{theme}.png"
                    shot.convert("RGB").save(path, optimize=True)
                    print(path)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
