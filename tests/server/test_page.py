"""The page in a real browser: a microphone fed from a WAV, a dropped file, texts as one speaks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine"),
]


@pytest.fixture
def page(tmp_path):
    """A page of headless Chromium whose microphone repeats codes 100, 200 … for a second each."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    sound = np.repeat(np.arange(1, 6, dtype=np.int16) * 4000, 16000)
    soundfile.write(tmp_path / "speech.wav", sound, 16000, subtype="PCM_16")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=BROWSER,
            args=[
                "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={tmp_path / 'speech.wav'}",
            ],
        )  # fmt: skip
        page = browser.new_context(permissions=["microphone"]).new_page()
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
        yield page
        browser.close()


def test_a_microphone_and_a_file(serving, page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    server, partial = serving(), page.locator("#partial")
    page.goto(server.url)
    page.click("#microphone")
    # By locators: the page's content security policy refuses JavaScript from a string.
    playwright.expect(partial).not_to_be_empty(timeout=30_000)
    playwright.expect(partial).not_to_have_text(partial.inner_text(), timeout=30_000)
    page.click("#microphone")
    page.wait_for_selector("#finals li")
    microphone = page.locator("#microphone")
    playwright.expect(microphone).to_have_attribute("aria-pressed", "false", timeout=30_000)
    heard = {int(n) for n in re.findall(r"-?\d+", page.inner_text("#finals li"))}
    # What the microphone was fed: the browser may resample and scale it a little.
    assert any(abs(n - 4000 * k) < 400 for n in heard for k in range(1, 6)), heard
    assert page.inner_text("#partial") == ""
    soundfile.write(tmp_path / "talk.wav", np.full(24000, 7, np.int16), 16000, subtype="PCM_16")
    (tmp_path / "bad.wav").write_text("no audio")
    page.set_input_files("#file", [tmp_path / "talk.wav", tmp_path / "bad.wav"])
    page.wait_for_selector("#finals li.error")
    lines = page.locator("#finals li").all_inner_texts()
    assert lines[-2].endswith("code 7") and "is no audio" in lines[-1]
    assert [fault for fault in page.faults if "400" not in fault] == []


def test_no_server_is_said(serving, page, tmp_path: Path):
    server = serving()
    page.goto(server.url)
    page.route("**/v1/audio/transcriptions", lambda route: route.abort())
    soundfile.write(tmp_path / "talk.wav", np.full(24000, 7, np.int16), 16000)
    page.set_input_files("#file", tmp_path / "talk.wav")
    page.wait_for_selector("#finals li.error")
    assert page.inner_text("#finals li.error").startswith("talk.wav: ")
