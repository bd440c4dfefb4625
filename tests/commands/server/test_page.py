"""The start page: one file, and it works in a real browser where one is installed."""

import os
import re
import shutil
import urllib.request

import pytest

from .conftest import NAME
from .scripted import THOUGHT

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def test_the_page_is_one_file_that_loads_nothing(server):
    with urllib.request.urlopen(server.url) as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"\b(src|href)=|https?:|//\w+\.|@import|url\(", text)


def test_a_person_talks_to_a_task_and_sees_the_selection(server, task):
    api = pytest.importorskip("playwright.sync_api")
    named = os.environ.get("MLX_IFP_TEST_CHROMIUM")
    browser_path = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip("no Chromium is installed; MLX_IFP_TEST_CHROMIUM names one")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(error))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(server.url)
        page.wait_for_function("document.getElementById('model').options.length == 3")
        page.select_option("#model", task)
        page.fill("#prompt", "What is the <b>car</b>?")
        page.click("#send")
        page.wait_for_selector(".note:has-text('first token')")
        assert page.inner_text(".message.user") == "What is the <b>car</b>?"
        assert "What is file." in page.inner_text("#talk")
        assert "50% of the channels, selected from given" in page.inner_text(".note")
        assert THOUGHT not in page.inner_text("#talk")
        page.fill("#prompt", "And?")
        page.press("#prompt", "Enter")
        page.wait_for_function("document.querySelectorAll('.note').length == 2")
        page.wait_for_selector(".note:nth-of-type(n+6):has-text('first token')")
        page.click("#new")
        assert page.inner_text("#talk") == ""
        # A model that was deleted meanwhile is named in the page.
        page.evaluate(
            f"get('model').append(new Option('{NAME}:gone')); get('model').value = '{NAME}:gone'"
        )
        page.fill("#prompt", "Hello")
        page.click("#send")
        page.wait_for_selector(".error:has-text('The models are')")
        browser.close()
    # The browser itself reports the 404 of the last question.
    assert [each for each in wrong if "404" not in str(each)] == []
