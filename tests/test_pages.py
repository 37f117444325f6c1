"""The site, as a reader has it: built without a warning, whole without the network, found and read by everybody."""

import functools
import os
import subprocess
import sys
import threading
import types
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import browsing
import pytest
from test_browser import wait

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pages")]
ROOT = Path(__file__).parents[1]
LOOKED_AT = [
    "",
    "guide/das/",
    "guide/moving/",
    "api/model/",
    "notebooks/01_emoji_chatbot/",
    "notebooks/08_where_and_how_strong/",
    "architectures/",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site in a folder; `--strict` makes an error of every warning."""
    pytest.importorskip("mkdocs", reason='needs mkdocs: pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served on the loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def driver():
    browsing.needed()
    with browsing.chromium() as made:
        yield made


def show(driver, address, page, scheme):
    """A page in light or dark; the theme remembers what it showed before, until that is cleared."""
    browsing.scheme(driver, scheme)
    driver.get(address + page)
    driver.execute_script("localStorage.clear()")
    driver.get_log("browser")
    browsing.requests(driver)
    driver.get(address + page)
    wait(lambda: driver.execute_script("return document.readyState") == "complete", "the page")
    assert (
        driver.execute_script("return document.body.dataset.mdColorScheme")
        == {"light": "default", "dark": "slate"}[scheme]
    )


def test_every_public_name_has_an_entry(site):
    import reftlens as rl

    inventory = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(inventory[inventory.index(b"zlib.\n") + 6 :]).decode().splitlines()
    entries = {line.split()[0] for line in lines}
    names = {name: getattr(rl, name) for name in rl.__all__}
    spaces = {name: space for name, space in names.items() if isinstance(space, types.ModuleType)}
    wanted = {f"reftlens.{name}" for name in names if name not in spaces}
    for space, module in spaces.items():
        inside = {name: getattr(module, name) for name in getattr(module, "__all__", [])}
        wanted |= {f"reftlens.{space}.{name}" for name, value in inside.items() if callable(value)}
    assert len(wanted) > 150 and not wanted - entries
    assert "reftlens.training.fitt" not in entries, "the twin"


def test_names_in_the_guides_lead_to_the_reference(site):
    page = (site / "guide" / "moving" / "index.html").read_text(encoding="utf-8")
    assert 'href="../../api/training/#reftlens.training.fit"' in page
    assert 'href="../../api/interventions/#reftlens.interventions.LoReFT"' in page


def test_no_page_asks_for_anything_outside(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not [host for host in ("cdnjs.", "unpkg.", "jsdelivr.", "googleapis.") if host in text], page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", LOOKED_AT)
def test_a_page_opens_without_a_complaint_and_axe_finds_nothing_serious(driver, address, page, scheme):
    browsing.needed(axe=True)
    show(driver, address, page, scheme)
    assert driver.get_log("browser") == []
    assert all(url.startswith(address) for url in browsing.requests(driver))
    assert browsing.violations(driver) == []


def test_the_search_finds_loreft(driver, address):
    show(driver, address, "", "light")
    field = driver.find_element("css selector", "input.md-search__input")
    driver.execute_script("arguments[0].focus()", field)
    field.send_keys("LoReFT")
    hits = "a.md-search-result__link"
    wait(lambda: driver.find_elements("css selector", hits), "what was found")
    found = [link.get_attribute("href") for link in driver.find_elements("css selector", hits)]
    assert any("api/interventions/" in link for link in found), found


@pytest.mark.parametrize("page", ["", "guide/moving/", "api/training/"])
def test_a_page_fits_a_telephone(driver, address, page):
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        show(driver, address, page, "light")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
