"""A headless Chromium for the tests that look at pages as a reader does."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)
AXE = "reftlens-ci/node_modules/axe-core/axe.min.js"


def needed(*, axe=False):
    """Skip, saying what to install, where something is missing."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason='needs selenium: pip install -e ".[test]"')
    if axe and axe_file() is None:
        pytest.skip("needs axe-core: npm install axe-core, and AXE_CORE=…/axe.min.js")


def axe_file():
    """Where axe-core is: the file that AXE_CORE names, or what `.ci/run` installs."""
    named = os.environ.get("AXE_CORE")
    path = Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / AXE)
    return path if path.is_file() else None


@contextmanager
def chromium(*, width=1280, height=900):
    """A driver with its own empty profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.set_script_timeout(120)  # seconds, on a busy machine
            driver.get("about:blank")
            requests(driver)  # of the page that a new window shows
            yield driver
        finally:
            driver.quit()


def scheme(driver, name):
    """Ask for "light" or "dark" pages."""
    features = [{"name": "prefers-color-scheme", "value": name}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requests(driver):
    """Addresses asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:"))]


def violations(driver):
    """What axe-core finds that is serious or worse: rule, and where."""
    driver.execute_script(axe_file().read_text(encoding="utf-8"))
    found = driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")["violations"]
    bad = [v for v in found if v["impact"] in ("serious", "critical")]
    return [(v["id"], [n["html"][:150] for n in v["nodes"]][:5]) for v in bad]


def whole_page(driver, path):
    """A picture of all of the page."""
    import base64

    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    Path(path).write_bytes(base64.b64decode(shot["data"]))
