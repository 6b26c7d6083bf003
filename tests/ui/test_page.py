"""The page in a browser: one server, one visit, and a new chat for each test."""

import asyncio
import gc
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browsers import CHROMIUM, FLAGS
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from serving_setup import MAX_MODEL_LEN, is_idle, wait_until

from ovis_jax.engine.runner import ModelRunner
from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.ui import events
from ovis_jax.ui.page import create_page, launch_page_in_thread

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = EXAMPLES / "shapes.png"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # Gradio uses deprecated options of pandas in every event, and does not close its event loops.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def url(scheduler):
    page = create_page(scheduler, "ovis-tiny")
    yield launch_page_in_thread(page)
    page.close(verbose=False)
    # Gradio made its own event loop the current one; the warning that it was not closed must not
    # appear in another test.
    asyncio.set_event_loop(None)
    gc.collect()


@pytest.fixture(scope="module")
def visit(url):
    """A visit that sends no request to another server and raises no error in a script."""
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        requested, errors = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(url)
        page.locator("#box textarea").wait_for()
        yield page
        browser.close()
    assert len(requested) > 5
    assert [x for x in requested if not x.startswith((url, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def page(visit):
    """The visit with a new chat."""
    for toast in visit.locator(".toast-close").all():
        toast.click()
    visit.fill("#box textarea", "text that New chat removes")
    visit.click("#new")
    expect(visit.locator("#pictures figure")).to_have_count(0)
    expect(visit.locator("#chat .example")).to_have_count(4)
    expect(visit.locator("#box textarea")).to_have_value("")
    return visit


@pytest.fixture
def show_every_token(monkeypatch):
    monkeypatch.setattr(events, "UPDATE_INTERVAL", 0.0)


@pytest.fixture
def other_page(visit, url):
    """A visit of somebody else."""
    page = visit.context.browser.new_page()
    page.goto(url)
    yield page
    page.close()


def attach(page: Page, *paths: Path, total: int = 0) -> None:
    """Attach pictures, and wait until the page shows the total number of them."""
    # Not set_input_files, which does nothing for the file that was attached last.
    with page.expect_file_chooser() as chooser:
        page.click("#box [data-testid=upload-button]")
    chooser.value.set_files(paths)
    expect(page.locator("#pictures figure")).to_have_count(total or len(paths))


def ask(page: Page, text: str) -> None:
    page.fill("#box textarea", text)
    page.click("#box .submit-button")


def answers(page: Page):
    return page.locator("#chat [data-testid=bot]")


def wait_for_answer(page: Page, number: int = 1) -> None:
    """Wait until the last of this many answers is complete."""
    expect(answers(page)).to_have_count(number)
    expect(answers(page).last).not_to_have_text("…")
    expect(page.locator("#box .submit-button")).to_be_visible()


def open_settings(page: Page) -> None:
    """Open the generation settings, and wait until all of them are there.

    They are created when they are first shown, and a value that is filled in before the last one is
    there can be lost. They do not appear in their order.
    """
    page.click("#controls button")
    expect(page.locator("#system textarea")).to_have_value("")
    for name, value in (("temperature", "0"), ("top-p", "1"), ("top-k", "0")):
        expect(page.locator(f"#{name} input[type=range]")).to_have_value(value)
    expect(page.locator("#longest input")).to_have_value("512")
    expect(page.locator("#seed input")).to_have_value("0")


def questions(page: Page):
    return page.locator("#chat [data-testid=user]")


@pytest.mark.usefixtures("show_every_token")
def test_answer_appears_gradually_and_a_follow_up_is_understood(page, ovis, decode_gate):
    attach(page, SHAPES)
    tokens = ovis.processor.encode("Hi", [Image.open(SHAPES)]).tokens
    expect(page.locator("#tokens")).to_have_text(str(np.count_nonzero(tokens <= -300)))
    ask(page, "Describe the picture.")
    decode_gate.run(2)
    expect(answers(page)).to_contain_text("There is")
    expect(answers(page)).not_to_contain_text("circle")
    decode_gate.run(6)
    expect(answers(page)).to_contain_text("yellow circle")
    expect(answers(page)).not_to_contain_text("left")
    decode_gate.open()
    expect(answers(page)).to_have_text(
        "There is a big yellow circle at the top, a small orange diamond at the top right, "
        "a big purple cross on the right and a big black cross at the bottom left."
    )
    expect(page.locator("#note")).to_contain_text("written")
    expect(page.locator("#tokens")).to_be_visible()  # the image is part of the next prompt too
    ask(page, "What colour is the diamond?")
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last).to_contain_text("orange")
    page.click("#new")
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#tokens")).to_have_count(0)


def test_two_images(page):
    attach(page, SHAPES, EXAMPLES / "digit.png")
    ask(page, "Which of the two pictures has more shapes?")
    expect(answers(page)).to_contain_text("first")
    expect(page.locator("#chat .user img")).to_have_count(2)


def test_example_takes_one_click(page):
    page.fill("#box textarea", "a draft")
    page.locator("#chat .example", has_text="Which word").click()
    expect(answers(page)).to_have_text("The word is WOLF.")
    expect(page.locator("#pictures figure")).to_have_count(1)
    expect(page.locator("#box textarea")).to_have_value("a draft")


@pytest.mark.usefixtures("show_every_token")
def test_visitors_are_answered_at_the_same_time(page, other_page, scheduler, decode_gate):
    for visitor in (page, other_page):
        attach(visitor, SHAPES)
        ask(visitor, "Describe the picture.")
    wait_until(scheduler, lambda: scheduler.num_running + scheduler.num_waiting == 2)
    decode_gate.run(8)
    for visitor in (page, other_page):
        expect(answers(visitor)).to_contain_text("yellow")
    assert scheduler.num_running == 2
    decode_gate.open()
    for visitor in (page, other_page):
        expect(answers(visitor)).to_contain_text("at the bottom left.")


@pytest.fixture
def submitted(scheduler, monkeypatch):
    """The requests that are submitted to the engine."""
    requests, submit = [], scheduler.submit

    def record(request):
        requests.append(request)
        submit(request)

    monkeypatch.setattr(scheduler, "submit", record)
    return requests


@pytest.mark.usefixtures("show_every_token")
def test_stop_button_aborts_the_request(page, scheduler, decode_gate, submitted):
    attach(page, SHAPES)
    ask(page, "Describe the picture.")
    decode_gate.run(8)
    expect(answers(page)).to_contain_text("yellow circle")
    page.click("#box .stop-button")
    expect(page.locator("#note")).to_contain_text("Stopped.")
    decode_gate.open()
    assert is_idle(scheduler)
    # The first token comes from the prefill. The tokens of the ninth step are not read any more.
    assert submitted[0].completion_tokens == 1 + 8
    # The partial answer is part of the conversation, and another question can be asked.
    expect(answers(page)).to_contain_text("yellow circle")
    expect(page.locator("#box .submit-button")).to_be_visible()


@pytest.mark.usefixtures("show_every_token")
def test_leaving_the_page_aborts_the_request(other_page, scheduler, decode_gate, submitted):
    attach(other_page, SHAPES)
    ask(other_page, "Describe the picture.")
    decode_gate.run(8)
    expect(answers(other_page)).to_contain_text("yellow circle")
    other_page.close()
    wait_until(scheduler, lambda: submitted[0].aborted)
    decode_gate.open()
    assert is_idle(scheduler)
    assert submitted[0].completion_tokens == 1 + 8


def test_broken_file_gets_a_message(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(SHAPES.read_bytes()[:200])
    page.fill("#box textarea", "a draft")
    page.set_input_files("#box input[type=file]", [broken, SHAPES])
    toast = page.locator(".toast-body")
    expect(toast).to_contain_text("broken.png cannot be shown: the bytes are not a complete")
    assert "Traceback" not in page.content() and str(tmp_path) not in toast.inner_text()
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)  # the other file is kept
    expect(page.locator("#pictures figure")).to_have_count(1)
    expect(page.locator("#box textarea")).to_have_value("a draft")


def test_draft_survives_an_answer_and_enter_is_held_back(page, decode_gate, submitted):
    attach(page, SHAPES)
    ask(page, "Describe the picture.")
    decode_gate.run(8)
    expect(page.locator("#box textarea")).to_have_value("")
    attach(page, EXAMPLES / "wide.png", total=2)
    page.fill("#box textarea", "What colour is the star?")
    page.press("#box textarea", "Enter")
    decode_gate.open()
    expect(answers(page)).to_contain_text("at the bottom left.")
    expect(page.locator("#box .submit-button")).to_be_visible()
    assert len(submitted) == 1
    expect(page.locator("#box textarea")).to_have_value("What colour is the star?")
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    page.press("#box textarea", "Enter")
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last).to_contain_text("purple")
    assert len(submitted) == 2 and len(submitted[1].pixels) == 1 + 3
    expect(page.locator("#box textarea")).to_have_value("")
    expect(page.locator("#box .thumbnail-item")).to_have_count(0)


def test_text_that_is_typed_while_a_question_is_sent_stays_in_the_box(page, submitted, monkeypatch):
    """Also if the server takes its time, and Enter is pressed again."""
    received, go_on = threading.Event(), threading.Event()
    open_images = events.open_uploaded_images

    def open_slowly(paths):
        received.set()
        assert go_on.wait(60)
        return open_images(paths)

    attach(page, SHAPES)
    monkeypatch.setattr(events, "open_uploaded_images", open_slowly)
    ask(page, "Describe the picture.")
    assert received.wait(60)
    page.focus("#box textarea")
    page.keyboard.press("End")
    page.keyboard.type(" And then?")
    page.press("#box textarea", "Enter")
    go_on.set()
    expect(answers(page)).to_contain_text("at the bottom left.")
    expect(page.locator("#box textarea")).to_have_value(" And then?")
    expect(page.locator("#box .thumbnail-item")).to_have_count(0)
    expect(page.locator("#pictures figure")).to_have_count(1)
    assert len(submitted) == 1


def test_long_text_is_pasted_as_text(page):
    text = "many words " * 200
    page.locator("#box textarea").evaluate(
        """(area, text) => { const data = new DataTransfer(); data.setData("text", text);
        window.pasted = area.dispatchEvent(
            new ClipboardEvent("paste", {clipboardData: data, cancelable: true})); }""",
        text,
    )
    assert page.evaluate("window.pasted")  # the page leaves it to the browser


def test_question_without_an_answer_can_be_undone(page):
    question = "word " * MAX_MODEL_LEN + "?"
    attach(page, SHAPES)
    ask(page, question)
    expect(answers(page)).to_contain_text("positions long")
    expect(page.locator("#note")).to_contain_text("The question has no answer.")
    page.fill("#box textarea", "a draft")
    page.click("#chat [aria-label=Undo]")
    expect(page.locator("#box textarea")).to_have_value(f"{question}\na draft")
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#pictures figure")).to_have_count(1)


def test_retry_asks_the_same_question_with_another_seed(page, scheduler, submitted):
    ask(page, "Who are you?")
    wait_for_answer(page)
    page.fill("#box textarea", "a draft")
    page.click("#chat [aria-label=Retry]")
    wait_until(scheduler, lambda: len(submitted) == 2)
    expect(page.locator("#note")).to_contain_text("written")
    expect(answers(page)).to_have_count(1)
    first, second = submitted
    assert np.array_equal(first.tokens, second.tokens)
    assert (first.seed, second.seed) == (0, 1)
    expect(page.locator("#box .submit-button")).to_be_visible()
    expect(page.locator("#box textarea")).to_have_value("a draft")


@pytest.fixture
def ignored(monkeypatch):
    """Set when the server ignores an event, because the visitor is being answered."""
    ignored, reserve = threading.Event(), events.PageEvents._reserve

    @contextmanager
    def observed(self, request):
        with reserve(self, request) as stream:
            if stream is None:
                ignored.set()
            yield stream

    monkeypatch.setattr(events.PageEvents, "_reserve", observed)
    return ignored


def test_enter_during_a_retry_is_held_back(page, scheduler, submitted, ignored, request):
    ask(page, "Who are you?")
    wait_for_answer(page)
    decode_gate = request.getfixturevalue("decode_gate")
    page.click("#chat [aria-label=Retry]")
    wait_until(scheduler, lambda: len(submitted) == 2)
    page.fill("#box textarea", "Why?")
    page.press("#box textarea", "Enter")
    assert ignored.wait(60)
    decode_gate.open()
    expect(page.locator("#box .submit-button")).to_be_visible()
    expect(page.locator("#box textarea")).to_have_value("Why?")
    assert len(submitted) == 2


def test_editing_a_question_removes_what_follows(page, submitted):
    attach(page, EXAMPLES / "wide.png")
    ask(page, "Where is the green heart?")
    wait_for_answer(page)
    attach(page, SHAPES, total=2)
    ask(page, "Which of the two pictures has more shapes?")
    wait_for_answer(page, 2)
    page.locator("#chat [aria-label=Edit]").first.click()
    expect(page.locator("#chat .edit-textarea")).to_have_value("Where is the green heart?")
    page.fill("#chat .edit-textarea", "What colour is the star?")
    page.click("#chat [aria-label=Submit]")
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_contain_text("purple")
    expect(questions(page)).to_have_text(["", "What colour is the star?"])
    expect(page.locator("#pictures figure")).to_have_count(1)
    assert len(submitted) == 3 and len(submitted[2].pixels) == 3


def test_question_cannot_be_emptied(page, submitted):
    ask(page, "Who are you?")
    wait_for_answer(page)
    page.click("#chat [aria-label=Edit]")
    page.fill("#chat .edit-textarea", " ")
    page.click("#chat [aria-label=Submit]")
    expect(page.locator(".toast-body")).to_contain_text("The question is empty.")
    expect(questions(page)).to_have_text("Who are you?")
    assert len(submitted) == 1


@pytest.mark.parametrize(
    "text",
    [
        "# 1 *a* **b** _c_ ~~d~~ `e` | f | > g",
        "- one\n- two\n\n1. three\n    four  five\tsix",
        "<b>bold</b> <img src=x> &amp; &#42; <!-- no -->",
        "$$x^2$$ [a](https://b.org) www.c.org d@e.org https://f.org ![g](h)",
        "%%%LATEX_BLOCK_0%%% \\*i\\* ```\nj\n``` “quoted” 你好 🙂 ---",
    ],
)
def test_questions_are_shown_and_edited_as_typed(page, text):
    ask(page, text)
    wait_for_answer(page)
    assert questions(page).inner_text() == text
    assert questions(page).locator("p *").count() == 0
    page.click("#chat [aria-label=Edit]")
    expect(page.locator("#chat .edit-textarea")).to_have_value(text)
    page.click("#chat [aria-label=Cancel]")


def test_system_text_is_read_before_the_first_question(page, submitted, ovis):
    open_settings(page)
    page.fill("#system textarea", " Be brief. ")
    for number, question in enumerate(("Who are you?", "Why?"), 1):
        ask(page, question)
        wait_for_answer(page, number)
    page.fill("#system textarea", "")
    page.click("#controls button")
    expected = ovis.processor.encode("Be brief.\n\nWho are you?").tokens
    first, second = submitted
    assert np.array_equal(first.tokens, expected)
    start = len(expected) - 1
    assert np.array_equal(second.tokens[:start], expected[:start])


def test_conversation_is_exported_as_json(page):
    attach(page, EXAMPLES / "word.png")
    ask(page, 'Which "word" is in the picture?')
    wait_for_answer(page)
    (answer,) = answers(page).all_inner_texts()
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "conversation.json"
    question = {"role": "user", "content": 'Which "word" is in the picture?'}
    assert json.loads(Path(download.value.path()).read_text()) == {
        "model": "ovis-tiny",
        "messages": [
            question | {"pictures": ["word.png"]},
            {"role": "assistant", "content": answer.strip()},
        ],
    }


def test_phone(visit, url):
    """The chat has nearly the whole width, and nothing is cut."""
    browser = visit.context.browser
    context = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True)
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#chat .example")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    chat = page.locator("#chat").bounding_box()
    assert chat and chat["width"] >= 330
    for inner in page.locator("#chat .example-text").all():
        box, outer = inner.bounding_box(), inner.locator("xpath=ancestor::button").bounding_box()
        assert box and outer and outer["x"] <= box["x"]
        assert box["x"] + box["width"] <= outer["x"] + outer["width"] <= chat["x"] + chat["width"]
        assert outer["y"] + outer["height"] <= chat["y"] + chat["height"]
    page.click("#chat .example >> nth=0")
    expect(answers(page)).to_contain_text("yellow")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    context.close()


def test_image_mark_in_a_text_is_text(page, submitted):
    """It neither moves a picture nor ends the conversation."""
    attach(page, SHAPES)
    for number, question in enumerate(("What does <image> mean?", "Why <image>?"), 1):
        ask(page, question)
        wait_for_answer(page, number)
    assert len(submitted) == 2
    for request in submitted:
        first = np.flatnonzero(request.tokens <= -300)[0]
        assert first == 4  # after <bos>, <start_of_turn>, user and a newline
        assert (request.tokens == -300).sum() == (submitted[0].tokens == -300).sum()


@pytest.fixture
def controls(page):
    """The page with its controls open; afterwards they have their default values."""
    page.click("#controls button")
    yield page
    page.fill("#seed input", "0")
    page.fill("#temperature input[type=number]", "0")
    page.click("#controls button")


@pytest.mark.parametrize(("seed", "bound"), [("-1", "less than minimum"), ("1e20", "greater than")])
def test_rejected_seed_does_not_end_the_visit(controls, seed, bound):
    page = controls
    page.fill("#temperature input[type=number]", "0.5")
    page.fill("#seed input", seed)
    ask(page, "Who?")
    expect(page.locator(".toast-body")).to_contain_text(bound)
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#chat .error")).to_be_hidden()
    expect(page.locator("#box textarea")).to_have_value("Who?")
    expect(page.locator("#box .submit-button")).to_be_enabled()
    expect(page.locator("#new")).to_be_enabled()


def test_failing_model_does_not_end_the_visit(page, monkeypatch, caplog):
    def run_prefill(*_):
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run_prefill", run_prefill)
        ask(page, "Who?")
        expect(answers(page)).to_contain_text("the model failed")
    assert "on fire" in caplog.text and "on fire" not in page.content()
    expect(page.locator("#box .submit-button")).to_be_visible()
    page.click("#chat [aria-label=Retry]")
    expect(page.locator("#note")).to_contain_text("written")
    wait_for_answer(page)
    expect(answers(page)).not_to_contain_text("failed")


def test_failing_page_does_not_end_the_visit(page, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(events, "sampling_from_controls", None)
        ask(page, "Who?")
        expect(answers(page)).to_contain_text("the page failed; the server's log has the details")
    assert "not callable" in caplog.text and "not callable" not in page.content()
    expect(page.locator("#box .submit-button")).to_be_visible()
    expect(page.locator("#new")).to_be_enabled()


def test_picture_alone_asks_to_be_described(page):
    attach(page, SHAPES)
    page.click("#box .submit-button")
    expect(answers(page)).to_contain_text("There is a big yellow circle at the top")
    expect(questions(page).last).to_have_text("Describe the picture.")


def test_empty_question_is_not_sent(page, submitted):
    ask(page, "Who are you?")
    wait_for_answer(page)
    page.press("#box textarea", "Enter")
    expect(page.locator(".toast-body")).to_contain_text("Write a question or attach a picture.")
    expect(answers(page)).to_have_count(1)
    page.fill("#box textarea", "Why?")
    expect(page.locator("#box textarea")).to_have_value("Why?")
    assert len(submitted) == 1


def test_controls_reach_the_engine(page, scheduler, monkeypatch):
    submitted = []

    def submit(request):
        submitted.append(request)
        raise RequestError("enough <seen>")

    monkeypatch.setattr(scheduler, "submit", submit)
    attach(page, EXAMPLES / "wide.png")
    expect(page.locator("#pictures")).to_contain_text("3 crops")
    page.fill("#partition input[type=number]", "1")
    page.press("#partition input[type=number]", "Enter")
    expect(page.locator("#pictures")).to_contain_text("1 crop")
    open_settings(page)
    for name, value in (("temperature", "0.5"), ("top-p", "0.9"), ("top-k", "7")):
        page.fill(f"#{name} input[type=number]", value)
        expect(page.locator(f"#{name} input[type=range]")).to_have_value(value)
    page.fill("#seed input", "3")
    page.click("#longest input")
    page.locator("[role=option]", has_text="64").first.click()
    ask(page, "Who?")
    expect(answers(page)).to_have_text("⚠️ enough <seen>")
    (request,) = submitted
    assert request.sampling == Sampling(temperature=0.5, top_k=7, top_p=0.9)
    assert (request.max_new_tokens, request.seed, len(request.pixels)) == (64, 3, 1)
