"""The pages in a real Chromium: `make browser` installs the requirements and runs these tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome is installed"),
    pytest.mark.skipif(
        find_spec("axe_playwright_python") is None, reason="the extra [browser] is not installed"
    ),
]
PATIENCE = 180_000
"""Milliseconds after which a browser gives up; large, for machines under load."""

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """A function that opens a page: opened(address, size, scheme); `asked` has its requests."""
    contexts = []

    def open_page(address: str, size: str = "desktop", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def comparison(l2pd: Any, small_model: Path, tmp_path: Path) -> str:
    """Address of the page of a comparison."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Sort: sgrnm\n</script><b>Add</b>: 346 + 855\n" + "long words " * 30)
    file = tmp_path / "page.html"
    named = ["--policy", "fixed_schedule", "--policy", "confidence_threshold,threshold=0.3"]
    settings = ["--model", small_model, "--max-new-tokens", 40, "--end-of-text", "off"]
    ended = l2pd("compare", *named, *settings, "--prompts", prompts, "--html", file)
    assert ended.returncode == 0, ended.stderr
    return file.as_uri()


def serious(page: Any) -> list[str]:
    """The serious and critical findings of axe-core."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {[node['html'][:120] for node in each['nodes'][:3]]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def width_over(page: Any) -> int:
    """By how many pixels the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_comparison_is_accessible_and_fits(opened, comparison, size, scheme) -> None:
    page = opened(comparison, size, scheme)
    for keys in ([], ["End"], ["Home", "ArrowRight", ".", "n"]):
        for key in keys:
            page.keyboard.press(key)
        assert serious(page) == []
        assert width_over(page) <= 0
    assert [url for url in page.asked if not url.startswith("data:")] == [comparison]
    assert page.complaints == []


def test_the_comparison_plays(opened, comparison) -> None:
    page = opened(comparison)
    masked = page.locator(".side >> nth=0 >> .token.masked")
    assert masked.count() == 40  # it opens before the first step
    page.keyboard.press("End")
    assert masked.count() == 0
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert masked.count() == 39
    assert "step 1 of 40" in page.locator(".state").first.inner_text()
    page.select_option("#speed", "32")
    page.keyboard.press(" ")
    page.get_by_text("step 40 of 40", exact=True).wait_for()
    assert masked.count() == 0
    page.keyboard.press("n")
    assert page.locator("#prompt-text").inner_text() == "</script><b>Add</b>: 346 + 855"
    marked = page.locator(".side >> nth=1 >> .token.differs").count()
    assert page.locator("#differences-text").inner_text().startswith(f"At {marked} of 40")


def test_names_stay_whole_and_cut_tables_are_shaded_on_a_phone(opened, comparison) -> None:
    page = opened(comparison, "phone")
    broken = page.evaluate(
        """() => {
          const found = [], answers = ".configurations, .canvas, .text, .piece, .hidden";
          const walker = document.createTreeWalker(document.querySelector("main"), 4);
          for (let node; (node = walker.nextNode());) {
            if (node.parentElement.closest(answers)) continue;
            for (const match of node.data.matchAll(/[A-Za-z]+/g)) {
              const range = document.createRange();
              range.setStart(node, match.index);
              range.setEnd(node, match.index + match[0].length);
              if (new Set([...range.getClientRects()].map((box) => box.top)).size > 1)
                found.push(match[0]);
            }
          }
          return found;
        }"""
    )
    assert broken == []
    cut = page.locator(".scroll").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => getComputedStyle(e).backgroundAttachment)"
    )
    assert cut
    assert set(cut) == {"local, local, scroll, scroll"}


def test_the_theme_can_be_chosen(opened, comparison) -> None:
    page = opened(comparison)
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) == light
    page.click("#theme")
    assert page.evaluate(background) != light
    assert serious(page) == []


@pytest.fixture(scope="module")
def demo(small_model: Path) -> Iterator[str]:
    """Address of `l2pd demo` on a free port."""
    if find_spec("gradio") is None:
        pytest.skip("the extra [demo] is not installed")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["demo", "--model", str(small_model), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "l2pd_tools.cli", *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(PATIENCE // 1000):
            assert server.poll() is None, server.communicate()[1]
            try:
                urllib.request.urlopen(address, timeout=30).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def test_the_demo_decodes_both_and_contacts_no_other_host(opened, demo) -> None:
    page = opened(demo)
    page.get_by_label("Canvas, in tokens").fill("16")
    page.get_by_role("button", name="Decode").click()
    sides = page.locator(".l2pd")
    page.wait_for_function(
        "[...document.querySelectorAll('.l2pd')].filter(e => e.innerText.includes('done')).length"
        " === 2"
    )
    assert "fixed_schedule" in sides.nth(0).inner_text()
    assert "confidence_threshold" in sides.nth(1).inner_text()
    assert sides.nth(0).locator(".masked").count() == 0
    assert [url for url in page.asked if not url.startswith((demo, "data:", "blob:"))] == []


def test_the_demo_shows_an_error_once(opened, demo) -> None:
    page = opened(demo)
    page.get_by_label("Right options").fill("threshold=much")
    page.get_by_role("button", name="Decode").click()
    page.get_by_text("option 'threshold' = 'much'").wait_for()
    assert page.get_by_role("alert").count() == 1
    assert page.get_by_text("Error", exact=True).count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_demo_has_readable_hints_and_whole_prompts(opened, demo, size, scheme) -> None:
    page = opened(demo, size, scheme)
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("Sort: " + "sgrnm " * 20)
    page.wait_for_timeout(500)
    assert prompt.evaluate("e => e.scrollHeight - e.clientHeight") <= 2
    assert width_over(page) <= 0
    assert [found for found in serious(page) if found.startswith("color-contrast")] == []
