"""Make the README's two pictures of the report from a run: docs/images/report-light.png and report-dark.png.

    .venv/bin/python tools/screenshots.py runs/2026-11-21T1429Z-serve-tiny-lm-6119

Needs Chromium and its driver (Debian: chromium, chromium-driver). The light picture shows the answer, the dark one
what else can be had.
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from planner.reports import html
from planner.results import load

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH = 1100  # px
LARGEST_BYTES = 300_000
PICTURES = {"light": ("header", "#answer"), "dark": ("#scatter", "#parallel")}  # scheme: from this element to that one
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars")  # fmt: skip
BOX = """
const [first, last] = [...arguments].map((selector) => document.querySelector(selector).getBoundingClientRect());
return {x: 0, y: Math.max(0, first.top + scrollY - 14), width: innerWidth, height: last.bottom - Math.max(0, first.top - 14) + 14, scale: 1};
"""


def main() -> int:
    """Write both pictures and return 0; 1 when one is too large for a README, 2 for wrong use."""
    if len(sys.argv) != 2 or not (shutil.which("chromium") and shutil.which("chromedriver")):
        print(__doc__, file=sys.stderr)
        return 2
    IMAGES.mkdir(parents=True, exist_ok=True)
    largest = 0
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "report.html"
        page.write_text(html.render(load(sys.argv[1])), encoding="utf-8")
        browser = _browser(Path(name) / "profile")
        try:
            for scheme in PICTURES:
                path = IMAGES / f"report-{scheme}.png"
                path.write_bytes(_picture(browser, page, scheme))
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
                largest = max(largest, path.stat().st_size)
        finally:
            browser.quit()
    return int(largest > LARGEST_BYTES)


def _browser(profile: Path) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )


def _picture(browser: Any, page: Path, scheme: str) -> bytes:
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    wanted = {"format": "png", "captureBeyondViewport": True, "clip": browser.execute_script(BOX, *PICTURES[scheme])}
    return base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", wanted)["data"])


if __name__ == "__main__":
    raise SystemExit(main())
