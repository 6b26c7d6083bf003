"""The page in a browser: one server, one visit, a new chat for each test."""

import asyncio
import gc
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsers import CHROMIUM, FLAGS
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import ovis_jax
from ovis_jax import answering
from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.serving import page as pages
from ovis_jax.serving import visits

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = EXAMPLES / "shapes.png"
# Gradio's own: what it does with pandas behind every event, and event loops it leaves behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

FIRST_ANSWER = 120_000
"""Milliseconds that a busy machine may take to compile."""


@pytest.fixture(scope="module")
def ovis():
    """ovis-tiny, with one shape for all that is asked here: one program."""
    ovis = ovis_jax.load("ovis-tiny")
    processor = replace(ovis.processor, buckets=(ovis_jax.Bucket(1, 192, 2),))
    return replace(ovis, processor=processor)


@pytest.fixture(scope="module")
def address(ovis):
    blocks = pages.build(ovis, "ovis-tiny")
    yield pages.launch(blocks)
    blocks.close(verbose=False)
    # What Gradio leaves behind, the loop that it has made the current one too, goes here and not in
    # the middle of another test.
    asyncio.set_event_loop(None)
    gc.collect()


@pytest.fixture(scope="module")
def visit(address):
    """A visit, in which nothing was asked of any other server and nothing went wrong in scripts."""
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(20_000)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address)
        page.locator("#box textarea").wait_for()
        yield page
        browser.close()
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def page(visit):
    """The visit with a new chat; nothing of the last one is left."""
    for toast in visit.locator(".toast-close").all():
        toast.click()
    visit.fill("#box textarea", "what New chat takes away")
    visit.click("#new")
    expect(visit.locator("#pictures figure")).to_have_count(0)
    expect(visit.locator("#chat .example")).to_have_count(4)
    expect(visit.locator("#box textarea")).to_have_value("")
    return visit


@pytest.fixture
def endless(monkeypatch):
    """Answers that no stop id ends; tells how many tokens were computed, and when it is over."""

    class Endless:
        tokens = 0
        over = threading.Event()

    real = answering.stream

    def stream(model, *arguments, **options):
        never = [-1] * len(model.config.eos_ids)  # as many: the same program
        try:
            for piece in real(model, *arguments, **options, eos_ids=never):
                Endless.tokens += 1
                time.sleep(0.02)
                yield piece
        finally:
            Endless.over.set()

    monkeypatch.setattr(answering, "stream", stream)
    return Endless


def attach(page: Page, *paths: Path) -> None:
    page.set_input_files("#box input[type=file]", paths)
    expect(page.locator("#pictures figure")).to_have_count(len(paths))


def ask(page: Page, text: str) -> None:
    page.fill("#box textarea", text)
    page.click("#box .submit-button")


def answers(page: Page):
    return page.locator("#chat [data-testid=bot]")


def test_an_answer_comes_piece_by_piece_and_a_second_turn_remembers(page, ovis, monkeypatch):
    monkeypatch.setattr(visits, "SHOWN_EVERY", 0.0)
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const bot = document.querySelector('#chat [data-testid=bot]');
            const text = bot ? bot.innerText.trim() : '';
            if (text && text != window.seen.at(-1)) window.seen.push(text);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    attach(page, SHAPES)
    tokens = ovis.processor(["Hi"], [[Image.open(SHAPES)]]).tokens
    expect(page.locator("#tokens")).to_have_text(str(np.count_nonzero(tokens <= -300)))
    ask(page, "Describe the picture.")
    expect(answers(page)).to_have_text(
        "There is a big yellow circle at the top, a small orange diamond at the top right, "
        "a big purple cross on the right and a big black cross at the bottom left.",
        timeout=FIRST_ANSWER,
    )
    dots, *seen = page.evaluate("window.seen")
    assert dots == "…" and len(set(seen)) >= 3
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False))
    expect(page.locator("#note")).to_contain_text("written")
    expect(page.locator("#tokens")).to_be_visible()  # the picture is still part of what is read
    ask(page, "What colour is the diamond?")
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last).to_contain_text("orange")
    page.click("#new")
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#tokens")).to_have_count(0)


def test_two_pictures(page):
    attach(page, SHAPES, EXAMPLES / "digit.png")
    ask(page, "Which of the two pictures has more shapes?")
    expect(answers(page)).to_contain_text("first", timeout=FIRST_ANSWER)
    expect(page.locator("#chat .user img")).to_have_count(2)


def test_an_example_is_one_click(page):
    page.locator("#chat .example", has_text="Which word").click()
    expect(answers(page)).to_have_text("The word is WOLF.", timeout=FIRST_ANSWER)


def test_stopping_ends_the_generation(page, endless):
    attach(page, SHAPES)
    ask(page, "Describe the picture.")
    expect(answers(page)).to_contain_text("yellow circle", timeout=FIRST_ANSWER)
    assert not endless.over.is_set()
    page.click("#box .stop-button")
    assert endless.over.wait(20) and endless.tokens < 500
    expect(page.locator("#note")).to_contain_text("Stopped.")
    computed = endless.tokens
    # What was said so far is part of the conversation, and a next answer can be asked for.
    expect(answers(page)).to_contain_text("yellow circle")
    expect(page.locator("#box .submit-button")).to_be_visible()
    assert endless.tokens == computed


def test_leaving_the_page_ends_the_generation(visit, address, endless):
    other = visit.context.browser.new_page()
    other.goto(address)
    attach(other, SHAPES)
    ask(other, "Describe the picture.")
    expect(answers(other)).to_contain_text("yellow circle", timeout=FIRST_ANSWER)
    assert not endless.over.is_set()
    other.close()
    assert endless.over.wait(20) and endless.tokens < 500


def test_a_broken_file_gets_a_message(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(SHAPES.read_bytes()[:200])
    page.set_input_files("#box input[type=file]", [broken, SHAPES])
    toast = page.locator(".toast-body")
    expect(toast).to_contain_text("broken.png cannot be shown: the bytes are not a whole")
    assert "Traceback" not in page.content() and str(tmp_path) not in toast.inner_text()
    expect(page.locator("#pictures figure")).to_have_count(1)  # the other one is kept


def test_a_question_that_is_refused_stands_in_the_box_again(page):
    ask(page, "What is <image> this?")
    expect(answers(page)).to_contain_text("holds <image> once, but 0 images come with it")
    expect(page.locator("#box textarea")).to_have_value("What is <image> this?")
    expect(page.locator("#note")).to_contain_text("not part of the conversation")


@pytest.fixture
def controls(page):
    """The page with its controls open; they are as they were behind it."""
    page.click("#controls button")
    yield page
    page.fill("#seed input", "0")
    page.fill("#temperature input[type=number]", "0")
    page.click("#controls button")


@pytest.mark.parametrize("seed", ["-1", "1e20"])
def test_a_seed_out_of_bounds_does_not_end_the_visit(controls, seed):
    page = controls
    page.fill("#temperature input[type=number]", "0.5")
    page.fill("#seed input", seed)
    ask(page, "Who?")
    expect(page.locator(".toast-body")).to_contain_text("than m")  # minimum, maximum
    expect(answers(page)).to_contain_text("was not asked")
    expect(page.locator("#box textarea")).to_have_value("Who?")
    expect(page.locator("#box .submit-button")).to_be_enabled()
    expect(page.locator("#new")).to_be_enabled()


def test_a_model_that_fails_does_not_end_the_visit(page, monkeypatch, caplog):
    def stream(*_, **__):
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(answering, "stream", stream)
        ask(page, "Who?")
        expect(answers(page)).to_contain_text("The model failed")
    expect(page.locator("#box textarea")).to_have_value("Who?")
    assert "on fire" in caplog.text and "on fire" not in page.content()
    page.click("#box .submit-button")
    expect(page.locator("#note")).to_contain_text("written", timeout=FIRST_ANSWER)
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last).not_to_contain_text("failed")


def test_a_picture_alone_is_no_question(page):
    attach(page, SHAPES)
    page.click("#box .submit-button")
    expect(page.locator(".toast-body")).to_contain_text("there is no question")


def test_the_controls_reach_the_generation(page, monkeypatch):
    got = {}

    def stream(model, params, inputs, key, **options):
        got.update(options, crops=np.count_nonzero(inputs.pixels.any(axis=(1, 2, 3))), key=key)
        raise RequestError("enough <seen>")

    monkeypatch.setattr(answering, "stream", stream)
    attach(page, EXAMPLES / "wide.png")
    expect(page.locator("#pictures")).to_contain_text("3 crops")
    page.fill("#partition input[type=number]", "1")
    page.press("#partition input[type=number]", "Enter")
    expect(page.locator("#pictures")).to_contain_text("1 crop")
    page.click("#controls button")
    for name, value in (("temperature", "0.5"), ("top-p", "0.9"), ("top-k", "7")):
        page.fill(f"#{name} input[type=number]", value)
    page.fill("#seed input", "3")
    page.click("#longest input")
    page.locator("[role=option]", has_text="64").first.click()
    ask(page, "Who?")
    expect(answers(page)).to_have_text("⚠️ enough <seen>")
    assert got["sampling"] == Sampling(temperature=0.5, top_k=7, top_p=0.9)
    assert got["max_new_tokens"] == 64 and got["crops"] == 1 and got["key"] is not None
