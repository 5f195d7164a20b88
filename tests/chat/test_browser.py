"""The page in headless Chromium; needs gradio, playwright and a Chromium of the system."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from zoo import gradient

from finetune.models import load_model

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen[str]) -> None:
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.25)
    raise AssertionError("the page did not come up")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_question_with_a_picture(tiny, tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    from peft import LoraConfig, get_peft_model

    base: Any = load_model(tiny("llama3_v2_5"))
    config = LoraConfig(r=4, target_modules=r"llm\..*\.q_proj", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "tuned"))
    msgs = [{"role": "user", "content": "What is this?"}]
    plain: Any = load_model(tiny("llama3_v2_5"))
    expected = plain.chat(image=gradient(), msgs=msgs, sampling=False, max_new_tokens=8)
    gradient().save(tmp_path / "a.png")

    port = free_port()
    command = [sys.executable, "-m", "finetune", "chat", "--web", "--port", str(port), "--device", "cpu", "--greedy"]
    command += ["--max_new_tokens", "8", "--model", str(tiny("llama3_v2_5")), "--adapter", str(tmp_path / "tuned")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(port, server)
        with playwright.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"http://127.0.0.1:{port}")
            page.locator("#question textarea").wait_for(timeout=60_000)
            page.locator("input[type=file]").first.set_input_files(str(tmp_path / "a.png"))
            page.wait_for_timeout(2000)
            page.locator("#question textarea").fill("What is this?")
            page.locator("#question button").click()
            playwright.expect(page.locator("#v1 .bot")).to_contain_text(expected.split("\n")[0], timeout=60_000)
            playwright.expect(page.locator("#v0 .bot")).not_to_be_empty()
            playwright.expect(page.locator("#v0 .user img")).to_be_visible()
            page.screenshot(path=os.environ.get("SCREENSHOT", str(tmp_path / "page.png")))
            page.locator("#question textarea").fill("Where is <box>1 2 3 4</box>, <b>bold</b>?")
            page.locator("#question button").click()
            playwright.expect(page.locator("#v1")).to_contain_text("Where is <box>1 2 3 4</box>, <b>bold</b>?")
            playwright.expect(page.locator("#v1 .bot")).to_have_count(2, timeout=60_000)
            page.get_by_text("clear the conversation").click()
            playwright.expect(page.locator("#v0 .bot")).to_have_count(0)
            page.locator("#question textarea").fill(" ")
            page.locator("#question button").click()
            playwright.expect(page.locator("body")).to_contain_text("write a question first")
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
