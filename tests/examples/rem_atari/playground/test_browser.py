"""The page in a real browser: it loads, keys act, the dream goes on, and going back shows the same pixels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from play_stages import make_test_stage

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `test`)")
from playwright.sync_api import Browser, BrowserContext, Page, expect  # noqa: E402

from rem_atari.playground.server import served  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
"""A browser in a container that asks nothing but the page."""

LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

expect.set_options(timeout=30_000)  # of a busy machine; what is there is found at once


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is served."""
    stage = make_test_stage(tmp_path_factory.mktemp("play") / "run")
    with served(stage) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=LAPTOP)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, address: str) -> Iterator[Page]:
    """The page, at the first frame of a game; whatever the browser complains of fails the test."""
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    open_page(page, address)
    yield page
    assert complaints == []


def open_page(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("#time-told")).to_contain_text("step 0")


def pixels(page: Page) -> tuple[bytes, bytes]:
    """Both screens as they are drawn."""
    return page.locator("#left .screen").screenshot(), page.locator("#right .screen").screenshot()


def press(page: Page, key: str, step: int) -> None:
    """Press a key that acts; wait for the step that it leads to."""
    page.keyboard.press(key)
    expect(page.locator("#time-told")).to_contain_text(f"step {step}")


def test_keys_act_the_dream_goes_on_and_going_back_shows_the_same_pixels(page: Page) -> None:
    expect(page.locator("#right .first")).to_have_text("has just seen the game")
    seen = [pixels(page)]
    assert seen[0][0] == seen[0][1], "game and dream begin at the same frame"
    for step, key in enumerate(["ArrowLeft", "ArrowRight", "KeyA"], start=1):
        press(page, key, step)
        seen.append(pixels(page))
    expect(page.locator("#time-told")).to_contain_text("step 3: left")
    expect(page.locator("#right .second")).to_contain_text("3 steps asleep")
    assert len({game for game, _ in seen}) == 4, "the ball falls"
    for step in (2, 1, 0):
        press(page, "Comma", step)
        assert pixels(page) == seen[step]
    for step in (1, 2, 3):
        press(page, "Period", step)
        assert pixels(page) == seen[step]


def test_the_past_branches_and_two_futures_are_compared(page: Page) -> None:
    compare = page.locator("#compare")
    expect(compare).to_be_disabled()
    press(page, "ArrowLeft", 1)
    press(page, "ArrowLeft", 2)
    first = pixels(page)
    press(page, "Comma", 1)
    press(page, "ArrowRight", 2)
    second = pixels(page)
    expect(page.locator(".lane.branch")).to_have_count(1)
    compare.click()
    expect(page.locator("#left .title")).to_have_text("Future A")
    expect(page.locator("#right .title")).to_have_text("Future B")
    expect(page.locator("#time-told")).to_contain_text("1 of 1 steps since the futures part")
    page.locator(".lane.branch .moment").first.wait_for()
    compare.click()
    expect(page.locator("#left .title")).to_have_text("The game")
    assert pixels(page) == second
    page.locator(".lane.branch .moment").click()
    assert pixels(page) == first


def test_the_agent_plays_at_the_clock_and_begins_again(page: Page) -> None:
    page.locator("[data-actor=game]").click()
    page.locator("#speed").fill("30")
    page.locator("#clock").click()
    expect(page.locator("#strip .start")).to_have_count(2)
    page.locator("#clock").click()
    expect(page.locator("#clock")).to_have_text("Play")


def test_tokens_likely_dreams_and_another_look(page: Page) -> None:
    page.keyboard.press("t")
    expect(page.locator("#left .tokens span")).to_have_count(9)
    page.keyboard.press("l")
    expect(page.locator("#likely")).to_have_attribute("aria-pressed", "true")
    press(page, "ArrowRight", 1)
    page.locator("#look").click()
    expect(page.locator("#right .first")).to_have_text("has just seen the game")
    expect(page.locator("#right .differs")).to_have_count(0)
    page.locator("#again").click()
    expect(page.locator("#right .second")).to_contain_text("1 step asleep")


def test_a_recorded_frame_is_entered_and_a_film_saved(page: Page, tmp_path: Path) -> None:
    expect(page.locator("#row-told")).to_have_text("1 to 12 of 60")
    page.locator("#frames button").nth(2).click()
    expect(page.locator("#strip .start")).to_have_count(2)
    frame = page.locator("#frames img").nth(2).get_attribute("src")
    expect(page.locator("#left img").first).to_have_attribute("src", frame)
    with page.expect_download() as download:
        page.locator("[data-film=gif]").click()
    assert download.value.suggested_filename == "Catch.gif"
    download.value.save_as(tmp_path / "film.gif")
    assert (tmp_path / "film.gif").read_bytes().startswith(b"GIF8")


def test_a_phone_plays_by_touch(browser: Browser, address: str) -> None:
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)
    page = context.new_page()
    open_page(page, address)
    expect(page.locator("#hint")).to_contain_text("Tap an action")
    page.locator("#pad button", has_text="→").tap()
    expect(page.locator("#time-told")).to_contain_text("step 1: right")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#pad").bounding_box()["y"] < PHONE["height"] - 60, "to be seen without scrolling"
    context.close()


def test_two_tabs_play_apart(context: BrowserContext, page: Page, address: str) -> None:
    other = context.new_page()
    open_page(other, address)
    press(page, "ArrowLeft", 1)
    expect(other.locator("#time-told")).to_contain_text("step 0")
    other.close()
    press(page, "ArrowLeft", 2)


def test_a_lost_server_is_told(page: Page, tmp_path: Path) -> None:
    with served(make_test_stage(tmp_path / "run")) as address:
        open_page(page, address)
    expect(page.locator("#notice")).to_contain_text(re.compile("connection is lost.*rem-atari play"))
