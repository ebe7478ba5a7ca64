"""`examples/app.py` in a real browser."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 90  # within which the app starts, or answers


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the app with what it takes by default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder)}
    with open(folder / "log.txt", "w+") as log:
        command = [sys.executable, str(EXAMPLES / "app.py"), "--port", str(port)]
        app = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            begin = time.monotonic()
            while not _answers(port):
                log.seek(0)
                assert app.poll() is None and time.monotonic() - begin < SECONDS, log.read()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
        finally:
            app.terminate()
            app.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture()
def page(browser, address):
    """The app, freshly opened; in the end nothing was fetched from elsewhere."""
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.set_window_size(1200, 1000)
    browser.get(address)
    wait(browser, lambda: browser.find_elements(By.XPATH, "//button[normalize-space()='Sample']"))
    yield browser
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith((address, "data:", "about:"))] == []


def wait(page, condition):
    return WebDriverWait(page, SECONDS, poll_frequency=0.1).until(lambda _: condition())


def sample(page):
    page.find_element(By.XPATH, "//button[normalize-space()='Sample']").click()


def results(page) -> list[str]:
    """What is said of each image, once both are there."""
    areas = page.find_elements(By.TAG_NAME, "textarea")
    return [area.get_attribute("value") for area in areas]


def test_the_button_draws_both_images_with_their_errors_and_times(page):
    sample(page)
    texts = wait(page, lambda: (texts := results(page)) and all(texts) and texts)
    errors, times = zip(*((float(text.split()[1]), float(text.split()[-5])) for text in texts), strict=True)
    # To the left the searched solver, to the right the pipeline's own scheduler.
    assert 0 < errors[0] < errors[1] / 2
    assert all(0 <= seconds < SECONDS for seconds in times)
    # What both should end at, and of each the image and its difference.
    sides = wait(page, lambda: (sides := drawn(page)) and len(sides) == 5 and all(sides) and sides)
    assert sides == [256] * 5
    assert page.get_log("browser") == []


def drawn(page) -> list[int]:
    """The widths of the images that the app has made."""
    images = page.find_elements(By.CSS_SELECTOR, "img[src*='/file=']")
    return [image.get_property("naturalWidth") for image in images]


def test_a_step_count_that_the_solver_lacks_is_answered_with_those_it_has(page):
    box = page.find_element(By.CSS_SELECTOR, "input[type=number][aria-label*='Steps']")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("2", Keys.TAB)
    sample(page)
    wait(page, lambda: "No solver for 2 steps: this scheduler has 5, 8 and 10" in page.page_source)
    assert wait(page, lambda: [text for text in results(page) if text])[0].startswith("error")
