"""The film of `rem-atari play` in the README: the page in a headless Chromium, played by a script.

    python docs/tools/play_film.py docs/play.gif

The agent of Catch that comes with the package plays a game, the player goes back and acts otherwise, and the
two futures are compared. Needs the extras `play` and `test`, and Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from rem_atari.commands.counting import tell
from rem_atari.commands.play import make_stage
from rem_atari.playground.server import served
from rem_atari.runs.trained import load_trained

VIEW = {"width": 1180, "height": 860}
WIDTH = 885
COLOURS = 256
PATIENCE_MILLISECONDS = 60_000
MILLISECONDS, LAST_MILLISECONDS = 800, 2_400


def play(page: Page) -> Iterator[None]:
    """Play; yields where the film has a picture."""
    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    told = page.locator("#time-told")

    def press(*keys: str, step: int) -> None:
        for key in keys:
            page.keyboard.press(key)
        expect(told).to_contain_text(f"step {step}")

    expect(told).to_contain_text("step 0")
    yield
    page.locator("[data-actor=game]").click()
    for step in range(1, 6):
        page.locator("#step").click()
        expect(told).to_contain_text(f"step {step}")
        yield
    for step in (4, 3):
        press("Comma", step=step)
    away = "ArrowRight" if "left" in told.inner_text() else "ArrowLeft"
    press("Comma", step=2)
    yield
    for step in (3, 4, 5):
        press(away, step=step)
        yield
    page.keyboard.press("c")
    for compared in range(1, 4):
        expect(told).to_contain_text(f"{compared} of 3 steps")
        yield
        page.keyboard.press("Period")


def film(address: str) -> list[Image.Image]:
    """The pictures, scaled down."""
    with sync_playwright() as programs:
        browser = programs.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=VIEW, device_scale_factor=2 * WIDTH / VIEW["width"])
        page.goto(address)
        shots = [Image.open(io.BytesIO(page.screenshot())).convert("RGB") for _ in play(page)]
        browser.close()
    return [shot.resize((WIDTH, round(WIDTH * shot.height / shot.width))) for shot in shots]


def _beside(shots: list[Image.Image]) -> Image.Image:
    """The pictures as one."""
    whole = Image.new("RGB", (shots[0].width, shots[0].height * len(shots)))
    for place, shot in enumerate(shots):
        whole.paste(shot, (0, place * shot.height))
    return whole


def main() -> None:
    """Write the film."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--agent", default="catch")
    arguments = parser.parse_args()
    trained = load_trained(arguments.agent, step="newest", device="cpu", say=tell)
    with served(make_stage(trained, name=arguments.agent, seed=0)) as address:
        shots = film(address)
    # One palette for all: pictures then differ from each other only where something moved.
    palette = _beside(shots).quantize(COLOURS, kmeans=2)
    first, *others = (shot.quantize(palette=palette, dither=Image.Dither.NONE) for shot in shots)
    durations = [MILLISECONDS] * len(others) + [LAST_MILLISECONDS]
    first.save(arguments.out, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    print(f"{arguments.out}: {len(shots)} pictures, {arguments.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
