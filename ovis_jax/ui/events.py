"""The page's event handlers: attaching images, asking questions, stopping answers and leaving."""

import asyncio
import html
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from ovis_jax.ui import gradio_isolation  # noqa: F401  must come before Gradio

# isort: split
import gradio as gr

from ovis_jax.engine.request import EventStream, FinishReason, Request
from ovis_jax.engine.scheduler import Scheduler
from ovis_jax.errors import OvisError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.ui.conversation import Conversation, open_uploaded_images
from ovis_jax.ui.crop_preview import NO_IMAGES_HTML, render_crop_previews

UPDATE_INTERVAL = 0.05
"""Minimum time between two updates of an answer, in seconds. Each update sends the whole chat."""

EMPTY_BOX = {"text": "", "files": []}
PENDING_ANSWER = "…"
NOT_STARTED = "The model was not asked; the message at the top says why."
QUESTION_RESTORED = "This question is not part of the conversation. It is in the text box again."

BoxContent = dict[str, Any]
"""The content of the text box: a dict with the "text" and the paths of the "files"."""
ChatMessages = tuple[dict[str, Any], ...]
"""The messages that the chat shows. They are stored on the server, because a browser could insert
the path of any file into messages that it sends back, and Gradio would serve a copy of the file."""


class PageEvents:
    """The event handlers of the page, for all visitors.

    Several visitors can be answered at the same time. Each handler returns new values for
    components of the page, in the order given in its docstring.

    Args:
      scheduler: The engine.
      examples: The questions that the page offers.
    """

    def __init__(self, scheduler: Scheduler, examples: Sequence[BoxContent]):
        self._scheduler, self._examples = scheduler, examples
        self._events: dict[str, EventStream] = {}  # of each session's last answer

    def preview_images(
        self, box: BoxContent, conversation: Conversation, max_partition: int, last_preview: Any
    ) -> tuple:
        """Draw the crops of all images, and remove other files from the text box.

        Args:
          box: The content of the text box.
          conversation: The conversation, whose images are drawn first.
          max_partition: Maximum number of cells per image.
          last_preview: Description of the current preview, which the previous call returned as its
            third value.

        Returns:
          The text box, the preview, and a description of the preview.
        """
        preview = tuple(box["files"]), len(conversation.images), max_partition
        if preview == last_preview:  # the images are the same, only the text has changed
            return gr.skip(), gr.skip(), gr.skip()
        uploads, problems = open_uploaded_images(box["files"])
        new_box = gr.skip()
        if problems:
            new_box = box | {"files": [path for path, _ in uploads]}
            preview = tuple(new_box["files"]), *preview[1:]
        images = [*conversation.images, *(image for _, image in uploads)]
        rendered, more = render_crop_previews(self._scheduler.processor, images, int(max_partition))
        for problem in [*problems, *more]:
            gr.Warning(html.escape(problem), title="Unusable picture")
        return new_box, rendered, preview

    def select_example(self, selected: gr.SelectData) -> BoxContent:
        """Return the example that was clicked, for the text box.

        Of the data from the browser, only the index is used, never a text or a path.
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
        self._events.pop(str(request.session_hash), None)  # it may have been stopped
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
        """Generate the answer to the last question until the model or the visitor ends it.

        Yields:
          The chat, its messages, the conversation, the text box, the status line and the button for
          a new chat.
        """
        events = self._events.setdefault(str(request.session_hash), EventStream())
        start_time, max_model_len = time.monotonic(), self._scheduler.max_model_len
        text, finish_reason, unchanged, update_time = "", None, gr.skip(), 0.0
        try:
            example = await asyncio.to_thread(
                self._scheduler.processor.encode,
                conversation.turns,
                conversation.images,
                max_partition=int(max_partition),
                max_length=max_model_len - 1,
                parse_special_tokens=False,
                parse_image_placeholders=False,
                name="the conversation",
            )
            answer = Request(
                tokens=example.tokens,
                pixels=example.pixels,
                sampling=sampling_from_controls(temperature, top_p, top_k),
                seed=int(seed or 0),
                max_new_tokens=min(int(max_tokens), max_model_len - len(example.tokens)),
                deadline=math.inf,
                on_event=events.put,
            )
            self._scheduler.submit(answer)
            try:
                async for delta in events.deltas(num_choices=1):
                    text, finish_reason = text + delta.text, delta.finish_reason
                    if time.monotonic() - update_time > UPDATE_INTERVAL:
                        chat = [*messages, _assistant_message(text)]
                        status = _status(answer, start_time)
                        yield chat, unchanged, unchanged, unchanged, status, unchanged
                        update_time = time.monotonic()
            finally:
                self._scheduler.abort(answer)
        except OvisError as error:
            yield restore_question(messages, conversation, question, str(error))
            return
        status = _status(answer, start_time, finish_reason or "stopped")
        messages = (*messages, _assistant_message(text or PENDING_ANSWER))
        conversation = conversation.with_answer(text)
        yield list(messages), messages, conversation, _idle_box(EMPTY_BOX), status, _idle_button()

    async def stop_answer(self, request: gr.Request) -> None:
        """Stop the visitor's answer after the stop button was pressed."""
        self._events.setdefault(str(request.session_hash), EventStream()).put(None)

    async def close_session(self, request: gr.Request) -> None:
        """Stop the visitor's answer and delete the session's data when the page is closed."""
        if events := self._events.pop(str(request.session_hash), None):
            events.put(None)


def sampling_from_controls(temperature: float, top_p: float, top_k: int) -> Sampling:
    """Convert the values of the controls to sampling parameters; top-k 0 and top-p 1 mean off."""
    if not temperature:
        return Sampling()
    return Sampling(temperature, int(top_k) or None, top_p if top_p < 1 else None)


def restore_question(
    messages: ChatMessages,
    conversation: Conversation,
    question: BoxContent,
    reason: str = NOT_STARTED,
) -> tuple:
    """Move an unanswered question back to the text box, and show the reason in the chat.

    Returns:
      The same components that `PageEvents.generate_answer` yields.
    """
    messages = (*messages, _assistant_message(f"⚠️ {html.escape(reason, quote=False)}"))
    conversation, status = conversation.without_last_question(), _status_line(QUESTION_RESTORED)
    return list(messages), messages, conversation, _idle_box(question), status, _idle_button()


def start_new_chat() -> tuple:
    """Reset the page to an empty conversation.

    Returns:
      The chat, its messages, the conversation, the text box, the status line, the preview, and the
      description of the preview.
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
    """Return a line with the tokens and times of an answer, and why it ended early if it did."""
    parts = [f"{len(answer.tokens):,} tokens read", f"{answer.completion_tokens:,} written"]
    if answer.first_token_time is not None:
        first, total = answer.first_token_time - start_time, time.monotonic() - start_time
        parts.append(f"{first:.1f} s to the first token, {total:.1f} s in total")
    if ending == "length":
        parts.append("cut off at the maximum length")
    return _status_line(("Stopped. " if ending == "stopped" else "") + " · ".join(parts))


def _status_line(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
