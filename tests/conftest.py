"""Fixtures that several files of tests share."""

import os
import shutil

import pytest
import torch
from fields import load
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from search.pipeline.field import NetworkCalls, PipelineField


BROWSER_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def open_field():
    """Opens fields, each with a counter of its own as `field.calls`, and closes them after the test."""
    opened = []

    def open_field(pipe, inputs, seeds, start=None) -> PipelineField:
        calls = NetworkCalls(pipe)
        opened.append(calls.remove)
        field = PipelineField(pipe, inputs, seeds, calls, start)
        field.calls = calls
        opened.append(field.close)
        return field

    yield open_field
    for close in reversed(opened):
        close()


@pytest.fixture(scope="module")
def digits_dit():
    return load("digits-dit")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        # In CI a missing browser is a failure: `.ci/run` installs one.
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("There is no chromium with chromedriver here. Install both to test the report in a browser.")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*BROWSER_OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(driver))
    yield driver
    driver.quit()
