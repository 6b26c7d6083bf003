"""Write the README's picture of the page: `python tests/page_picture.py docs/images/page.png`."""

import io
import sys
from pathlib import Path

from browsers import CHROMIUM, FLAGS
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import ovis_jax
from ovis_jax.serving import page as pages

EXAMPLES = Path(__file__).parents[1] / "examples"


def main(path: Path) -> None:
    blocks = pages.build(ovis_jax.load("ovis-tiny"), "ovis-tiny")
    address = pages.launch(blocks)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1240, "height": 800})
        page.goto(address)
        answers = page.locator("#chat [data-testid=bot]")
        page.set_input_files("#box input[type=file]", EXAMPLES / "wide.png")
        expect(page.locator("#pictures figure")).to_have_count(1, timeout=60_000)
        for turn, question in enumerate(
            ("Where is the green heart?", "What colour is the star?"), 1
        ):
            page.fill("#box textarea", question)
            page.click("#box .submit-button")
            expect(answers).to_have_count(turn, timeout=60_000)
            expect(page.locator("#box .stop-button")).to_have_count(0, timeout=300_000)
            expect(answers.last).not_to_have_text("…")
        page.wait_for_timeout(1000)
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    blocks.close(verbose=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # 256 colours are enough for a page, and a third of the bytes.
    picture.convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
