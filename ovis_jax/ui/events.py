"""The page's events: a visitor attaches an image, asks a question, stops the answer or leaves."""

import asyncio
import html
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Literal

from ovis_jax.ui import private_dir  # noqa: F401  must come before Gradio

# isort: split
import gradio as gr

from ovis_jax.engine.request import Delta, Failure, FinishReason, Request
from ovis_jax.engine.scheduler import Scheduler
from ovis_jax.errors import OvisError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.processor import Processor
from ovis_jax.ui.conversation import Conversation, open_uploaded_images
from ovis_jax.ui.image_preview import NO_IMAGES_HTML, render_image_previews

UPDATE_INTERVAL = 0.05
"""Minimum time between two updates of an answer in seconds; each sends the whole chat."""

EMPTY_BOX = {"text": "", "files": []}
PENDING_ANSWER = "…"
NOT_STARTED = "The model was not asked; the message at the top says why."
QUESTION_RESTORED = "This question is not part of the conversation. It is in the text box again."

BoxContent = dict[str, Any]
"""The content of the text box: "text", and the paths of "files"."""
ChatMessages = tuple[dict[str, Any], ...]
"""The messages that the chat shows. The server keeps them: a browser that sent them back could put
the path of any file into them, and Gradio would serve a copy of the file."""
AnswerEvents = asyncio.Queue[Delta | Failure | None]
"""The events of one answer; None if the visitor stops it."""


class PageEvents:
    """The event handlers of the page, for all visitors.

    Several visitors are answered at the same time. Handlers return new values of the page's
    components, in the order that each docstring gives.

    Args:
      scheduler: The engine.
      processor: Processor of the model.
      examples: The questions that the page offers.
    """

    def __init__(self, scheduler: Scheduler, processor: Processor, examples: Sequence[BoxContent]):
        self._scheduler, self._processor, self._examples = scheduler, processor, examples
        self._events: dict[str, AnswerEvents] = {}  # by session

    def preview_images(
        self, box: BoxContent, conversation: Conversation, max_partition: int, last_preview: Any
    ) -> tuple:
        """Draw the crops of all images, and remove files that are not images from the text box.

        Args:
          box: The content of the text box.
          conversation: The conversation, whose images are drawn first.
          max_partition: Maximum number of cells per image.
          last_preview: What the current preview shows; the third value of the last call.

        Returns:
          The text box, the preview, and what it shows.
        """
        preview = tuple(box["files"]), len(conversation.images), max_partition
        if preview == last_preview:  # only the text has changed
            return gr.skip(), gr.skip(), gr.skip()
        uploads, problems = open_uploaded_images(box["files"])
        new_box = gr.skip()
        if problems:
            new_box = box | {"files": [path for path, _ in uploads]}
            preview = tuple(new_box["files"]), *preview[1:]
        images = [*conversation.images, *(image for _, image in uploads)]
        rendered, more = render_image_previews(self._processor, images, int(max_partition))
        for problem in [*problems, *more]:
            gr.Warning(html.escape(problem), title="Unusable picture")
        return new_box, rendered, preview

    def select_example(self, selected: gr.SelectData) -> BoxContent:
        """Return the example that was clicked, for the text box.

        Only the index that the browser sends is used, never a text or a path.
        """
        index = selected.index
        if type(index) is not int or not 0 <= index < len(self._examples):
            raise gr.Error("There is no such example.", title="Not sent", print_exception=False)
        return self._examples[index]

    def submit_question(
        self,
        box: BoxContent,
        messages: ChatMessages,
        conversation: Conversation,
        request: gr.Request,
    ) -> tuple:
        """Move the question from the text box to the conversation.

        Returns:
          The text box, the chat, its messages, the conversation, the question, the status line and
          the button for a new chat.
        """
        uploads, problems = open_uploaded_images(box["files"])
        try:
            if problems:
                raise OvisError(problems[0])
            conversation = conversation.with_question(box["text"], [image for _, image in uploads])
        except OvisError as error:
            text = html.escape(str(error))
            raise gr.Error(text, title="Not sent", print_exception=False) from None
        self._events[str(request.session_hash)] = asyncio.Queue()
        pictures = (
            {"role": "user", "content": {"path": path, "alt_text": "a picture"}}
            for path in box["files"]
        )
        messages = (*messages, *pictures, {"role": "user", "content": box["text"].strip()})
        new_box = gr.MultimodalTextbox(value=EMPTY_BOX, submit_btn=False, stop_btn=True)
        chat = [*messages, _assistant_message(PENDING_ANSWER)]
        button = gr.Button(interactive=False)
        return new_box, chat, messages, conversation, box, _status_line("Reading …"), button

    async def generate_answer(
        self,
        messages: ChatMessages,
        conversation: Conversation,
        question: BoxContent,
        max_partition: int,
        temperature: float,
        top_p: float,
        top_k: int,
        max_tokens: int,
        seed: int | None,
        request: gr.Request,
    ) -> AsyncIterator[tuple]:
        """Answer the last question until the model or the visitor stops.

        Yields:
          The chat, its messages, the conversation, the text box, the status line and the button for
          a new chat.
        """
        events = self._events.setdefault(str(request.session_hash), asyncio.Queue())
        loop, start_time = asyncio.get_running_loop(), time.monotonic()

        def on_event(event: Delta | Failure) -> None:
            with suppress(RuntimeError):  # the loop is closed, so the page is too
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            max_model_len = self._scheduler.max_model_len
            example = await asyncio.to_thread(
                self._processor.encode,
                conversation.turns,
                conversation.images,
                max_partition=int(max_partition),
                max_length=max_model_len - 1,
                parse_special_tokens=False,
                name="the conversation",
            )
            answer = Request(
                tokens=example.tokens,
                pixels=example.pixels,
                sampling=sampling_from_controls(temperature, top_p, top_k),
                seed=int(seed or 0),
                max_new_tokens=min(int(max_tokens), max_model_len - len(example.tokens)),
                deadline=math.inf,
                on_event=on_event,
            )
            self._scheduler.submit(answer)
        except OvisError as error:
            yield restore_question(messages, conversation, question, str(error))
            return

        text, finish_reason, unchanged, update_time = "", None, gr.skip(), 0.0
        try:
            while finish_reason is None and (event := await events.get()) is not None:
                if isinstance(event, Failure):
                    yield restore_question(messages, conversation, question, event.message)
                    return
                text, finish_reason = text + event.text, event.finish_reason
                if time.monotonic() - update_time > UPDATE_INTERVAL:
                    chat, status = (
                        [*messages, _assistant_message(text)],
                        _status(answer, start_time),
                    )
                    yield chat, unchanged, unchanged, unchanged, status, unchanged
                    update_time = time.monotonic()
        finally:
            self._scheduler.abort(answer)
        status = _status(answer, start_time, finish_reason or "stopped")
        messages = (*messages, _assistant_message(text or PENDING_ANSWER))
        conversation = conversation.with_answer(text)
        yield list(messages), messages, conversation, _idle_box(EMPTY_BOX), status, _idle_button()

    async def stop_answer(self, request: gr.Request) -> None:
        """Stop the visitor's answer: the button was pressed."""
        if events := self._events.get(str(request.session_hash)):
            events.put_nowait(None)

    async def close_session(self, request: gr.Request) -> None:
        """Stop the visitor's answer and forget the visitor: the page was closed."""
        if events := self._events.pop(str(request.session_hash), None):
            events.put_nowait(None)


def sampling_from_controls(temperature: float, top_p: float, top_k: int) -> Sampling:
    """Convert the values of the controls; 0 and 1 disable top-k and top-p."""
    if not temperature:
        return Sampling()
    return Sampling(temperature, int(top_k) or None, top_p if top_p < 1 else None)


def restore_question(
    messages: ChatMessages,
    conversation: Conversation,
    question: BoxContent,
    reason: str = NOT_STARTED,
) -> tuple:
    """Put a question without an answer back into the text box, and the reason into the chat.

    Returns:
      The components that `PageEvents.generate_answer` yields.
    """
    messages = (*messages, _assistant_message(f"⚠️ {html.escape(reason, quote=False)}"))
    conversation, status = conversation.without_last_question(), _status_line(QUESTION_RESTORED)
    return list(messages), messages, conversation, _idle_box(question), status, _idle_button()


def start_new_chat() -> tuple:
    """Return an empty page.

    Returns:
      The chat, its messages, the conversation, the text box, the status line, the preview, and what
      it shows.
    """
    return [], (), Conversation(), EMPTY_BOX, "", NO_IMAGES_HTML, None


def _idle_box(content: BoxContent) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(value=content, submit_btn=True, stop_btn=False)


def _idle_button() -> gr.Button:
    return gr.Button(interactive=True)


def _assistant_message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _status(
    answer: Request, start_time: float, ending: FinishReason | Literal["stopped"] | None = None
) -> str:
    """Report the tokens and times of an answer, and how it ended unless at a stop id."""
    parts = [f"{len(answer.tokens):,} tokens read", f"{answer.completion_tokens:,} written"]
    if answer.first_token_time is not None:
        first, total = answer.first_token_time - start_time, time.monotonic() - start_time
        parts.append(f"{first:.1f} s to the first token, {total:.1f} s in total")
    if ending == "length":
        parts.append("cut off at the maximum length")
    return _status_line(("Stopped. " if ending == "stopped" else "") + " · ".join(parts))


def _status_line(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
