"""Take the screenshot of the page for docs/: `python tests/ui/page_picture.py PNG`."""

import io
import sys
from pathlib import Path

from browsers import CHROMIUM, FLAGS
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import ovis_jax
from ovis_jax.engine.scheduler import run_engine
from ovis_jax.ui.page import create_page, launch_page_in_thread

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = ("Where is the green heart?", "What colour is the star?")


def take_picture(url: str) -> Image.Image:
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1240, "height": 800})
        page.goto(url)
        answers = page.locator("#chat [data-testid=bot]")
        page.set_input_files("#box input[type=file]", EXAMPLES / "wide.png")
        expect(page.locator("#pictures figure")).to_have_count(1)
        for turn, question in enumerate(QUESTIONS, 1):
            page.fill("#box textarea", question)
            page.click("#box .submit-button")
            expect(answers).to_have_count(turn)
            expect(page.locator("#box .stop-button")).to_have_count(0)
            expect(answers.last).not_to_have_text("…")
        page.wait_for_timeout(1000)  # for animations
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    return picture


def main(path: Path) -> None:
    with run_engine(ovis_jax.load("ovis-tiny"), max_num_seqs=1, max_model_len=512) as scheduler:
        blocks = create_page(scheduler, "ovis-tiny")
        picture = take_picture(launch_page_in_thread(blocks))
        blocks.close(verbose=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # 256 colors are enough for the page and take a third of the bytes.
    picture.convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
