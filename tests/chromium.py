"""A headless Chromium that reaches this machine alone, for the tests that look at pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def programs() -> tuple[str, str]:
    """Where the browser is, and the program that drives it; without them the test is skipped."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip(f"needs chromedriver and a browser, one of {', '.join(BROWSERS)}")
    return browser, driver


@contextmanager
def chromium(profile: Path, logs: bool = False) -> Iterator:
    """A driver of a browser whose profile is an empty folder; ``logs`` keeps what its console and network tell."""
    browser, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    if logs:
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for option in (
        "--headless=new",
        "--window-size=1000,1600",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",  # small in a container
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(option)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    with pytest.MonkeyPatch.context() as patch:
        # with the driver's path selenium looks for none; were it to, then neither on the network nor telling of it
        patch.setenv("SE_OFFLINE", "true")
        patch.setenv("SE_AVOID_STATS", "true")
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        page = webdriver.Chrome(options, webdriver.ChromeService(driver))
        try:
            yield page
        finally:
            page.quit()
