"""The page's event handlers: attaching images, asking questions, stopping answers and leaving."""

import asyncio
import html
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
NO_ANSWER = "The question has no answer. Edit it, retry, or undo to get it back."
STOPPED_EARLY = "stopped before the answer began"
FAILED = "the page failed; the server's log has the details"
UNDONE = "The question is in the text box again."

BoxContent = dict[str, Any]
"""The content of the text box: a dict with the "text" and the paths of the "files"."""
Update = dict[Any, Any]
"""New values of components; the other components stay as they are. Gradio would empty all of them
after a handler that yields nothing."""

REMOVE_FROM_BOX = """(box, taken) => [{
  text: box.text.startsWith(taken.text) ? box.text.slice(taken.text.length) : box.text,
  files: box.files.filter((file) => !taken.files.includes(file.path)),
}, taken.number]"""
"""JavaScript that removes `Components.taken` from the box, and keeps what came after it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """The components of the page that the handlers change.

    Attributes:
      chat: The chat. It is never an input, because a browser could insert any path into it.
      box: The text box. An answer changes its content only by `REMOVE_FROM_BOX`, so that nothing is
        lost that the visitor types in the meantime.
      taken: Content that the browser must remove from the box, with a number. After that, the
        preview is drawn again.
      last_taken: The number of `taken`, on the server.
      status: The status line.
      new_chat: The button for a new chat.
      preview: The preview of the images.
      conversation: The conversation.
      previewed: Description of what `preview` shows.
    """

    chat: gr.Chatbot
    box: gr.MultimodalTextbox
    taken: gr.JSON
    last_taken: gr.State
    status: gr.HTML
    new_chat: gr.Button
    preview: gr.HTML
    conversation: gr.State
    previewed: gr.State


class PageEvents:
    """The event handlers of the page, for all visitors.

    Several visitors can be answered at the same time. While a visitor is being answered, all of the
    visitor's events that would change the conversation are ignored.

    The settings of an answer are the maximum number of cells per image, the system text, the
    temperature, top p, top k, the maximum number of tokens and the seed.

    Args:
      scheduler: The engine.
      components: The components that the handlers change.
      examples: The questions that the page offers.
      model_name: Name of the model in exported conversations.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        components: Components,
        examples: Sequence[BoxContent],
        model_name: str,
    ):
        self._scheduler, self._components = scheduler, components
        self._examples, self._model_name = examples, model_name
        self._running: dict[str, EventStream] = {}  # of each session that is being answered
        self._counter = itertools.count(1)

    def preview_images(
        self,
        box: BoxContent,
        conversation: Conversation,
        max_partition: int,
        previewed: Any,
        last_taken: int,
        removed: int,
    ) -> Update:
        """Draw the crops of all images, and remove other files from the text box.

        Args:
          box: The content of the text box.
          conversation: The conversation, whose images are drawn first.
          max_partition: Maximum number of cells per image.
          previewed: Description of the current preview.
          last_taken: Number of the last `Components.taken`.
          removed: Number of the one that the browser removed last. If it is not the same, this
            handler is called again.
        """
        if removed != last_taken:  # some images of the conversation are still in the box
            return gr.skip()
        asked = [path for exchange in conversation.prompted for path in exchange.files]
        shown = (*asked, *box["files"]), max_partition
        if shown == previewed:  # the images are the same, only the text has changed
            return gr.skip()
        uploads, problems = open_uploaded_images(box["files"])
        update: Update = {}
        if problems:
            usable = [path for path, _ in uploads]
            unusable = [path for path in box["files"] if path not in usable]
            update = self._take({"text": "", "files": unusable})
            shown = (*asked, *usable), max_partition
        images = [image for exchange in conversation.prompted for image in exchange.images]
        images += [image for _, image in uploads]
        rendered, more = render_crop_previews(self._scheduler.processor, images, int(max_partition))
        for problem in [*problems, *more]:
            gr.Warning(html.escape(problem), title="Unusable picture")
        return update | {self._components.preview: rendered, self._components.previewed: shown}

    async def ask(
        self, request: gr.Request, box: BoxContent, conversation: Conversation, *settings: Any
    ) -> AsyncIterator[Update]:
        """Ask the question in the text box."""
        with self._reserve(request) as stream:
            if stream is None:
                yield gr.skip()
                return
            uploads, problems = await asyncio.to_thread(open_uploaded_images, box["files"])
            if not (box["text"].strip() or box["files"]):
                problems = ["Write a question or attach a picture."]
            if problems:
                gr.Warning(html.escape(problems[0]), title="Not sent")
                yield gr.skip()
                return
            images = [image for _, image in uploads]
            asked = conversation.ask(box["text"], box["files"], images)
            async for update in self._answer(stream, box, asked, *settings):
                yield update

    async def ask_example(
        self,
        request: gr.Request,
        selected: gr.SelectData,
        conversation: Conversation,
        *settings: Any,
    ) -> AsyncIterator[Update]:
        """Ask the example that was clicked.

        Of the data from the browser, only the index is used, never a text or a path.
        """
        number = _checked_index(selected.index, len(self._examples), "example")
        example = self._examples[number]
        with self._reserve(request) as stream:
            if stream is None:
                yield gr.skip()
                return
            uploads, _ = await asyncio.to_thread(open_uploaded_images, example["files"])
            images = [image for _, image in uploads]
            asked = conversation.ask(example["text"], example["files"], images)
            async for update in self._answer(stream, EMPTY_BOX, asked, *settings):
                yield update

    async def retry(
        self, request: gr.Request, conversation: Conversation, *settings: Any
    ) -> AsyncIterator[Update]:
        """Ask the last question again."""
        with self._reserve(request) as stream:
            if stream is None or not conversation.exchanges:
                yield gr.skip()
                return
            asked = conversation.retry()
            async for update in self._answer(stream, EMPTY_BOX, asked, *settings):
                yield update

    async def edit(
        self,
        request: gr.Request,
        edited: gr.EditData,
        conversation: Conversation,
        *settings: Any,
    ) -> AsyncIterator[Update]:
        """Ask an edited question, and forget everything after it.

        Of the data from the browser, only the index and the new text are used.
        """
        message = _checked_index(edited.index, 2 * len(conversation.exchanges), "question")
        with self._reserve(request) as stream:
            if stream is None:
                yield gr.skip()
                return
            text = str(edited.value)
            if not (text.strip() or conversation.exchanges[message // 2].files):
                gr.Warning("The question is empty.", title="Not sent")
                yield {self._components.chat: conversation.messages()}
                return
            asked = conversation.edit(message // 2, text)
            async for update in self._answer(stream, EMPTY_BOX, asked, *settings):
                yield update

    async def undo(
        self, request: gr.Request, box: BoxContent, conversation: Conversation
    ) -> Update:
        """Move the last question to the beginning of the text box, and forget its answer."""
        components = self._components
        if str(request.session_hash) in self._running or not conversation.exchanges:
            return gr.skip()
        last, conversation = conversation.exchanges[-1], conversation.without_last()
        text = "\n".join(filter(None, (last.text, box["text"])))
        return {
            components.chat: conversation.messages(),
            components.conversation: conversation,
            components.box: {"text": text, "files": [*last.files, *box["files"]]},
            components.status: _status_line(UNDONE),
        }

    async def start_new_chat(self, request: gr.Request) -> Update:
        """Reset the page to an empty conversation and an empty text box."""
        components = self._components
        if str(request.session_hash) in self._running:
            return gr.skip()
        return {
            components.chat: [],
            components.conversation: Conversation(),
            components.box: EMPTY_BOX,
            components.status: "",
            components.preview: NO_IMAGES_HTML,
            components.previewed: None,
        }

    def export(self, conversation: Conversation, system_text: str) -> str:
        """Return the conversation as JSON, which the browser saves."""
        return conversation.to_json(self._model_name, system_text)

    async def stop_answer(self, request: gr.Request) -> None:
        """Stop the visitor's answer, because the stop button was pressed or the page was closed."""
        if stream := self._running.get(str(request.session_hash)):
            stream.put(None)

    def _take(self, content: BoxContent) -> Update:
        """Remove content from the box."""
        number = next(self._counter)
        return {
            self._components.taken: content | {"number": number},
            self._components.last_taken: number,
        }

    @contextmanager
    def _reserve(self, request: gr.Request) -> Iterator[EventStream | None]:
        """Reserve a session for one answer; yield None if another one is running."""
        session = str(request.session_hash)
        if session in self._running:
            yield None
            return
        stream = self._running[session] = EventStream()
        try:
            yield stream
        finally:
            del self._running[session]

    async def _answer(
        self,
        stream: EventStream,
        taken: BoxContent,
        conversation: Conversation,
        max_partition: int,
        system_text: str,
        temperature: float,
        top_p: float,
        top_k: int,
        max_tokens: int,
        seed: int | None,
    ) -> AsyncIterator[Update]:
        """Generate the answer to the last question until the model or the visitor ends it.

        `taken` is what the question has taken from the text box. Even if it is empty, the preview
        is drawn again.
        """
        components, processor = self._components, self._scheduler.processor
        start_time = time.monotonic()
        yield self._take(taken) | {
            components.chat: conversation.messages(),
            components.conversation: conversation,
            components.box: gr.MultimodalTextbox(submit_btn=False, stop_btn=True),
            components.status: _status_line("Reading …"),
            components.new_chat: gr.Button(interactive=False),
        }
        text, finish_reason, update_time = "", None, 0.0
        max_model_len = self._scheduler.max_model_len
        try:
            turns, images = conversation.prompt(
                system_text, has_system_turns=processor.chat_format.has_system_turns
            )
            example = await asyncio.to_thread(
                processor.encode,
                turns,
                images,
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
                seed=int(seed or 0) + conversation.num_retries,
                max_new_tokens=min(int(max_tokens), max_model_len - len(example.tokens)),
                deadline=math.inf,
                on_event=stream.put,
            )
            self._scheduler.submit(answer)
            try:
                async for delta in stream.deltas(num_choices=1):
                    text, finish_reason = text + delta.text, delta.finish_reason
                    if time.monotonic() - update_time > UPDATE_INTERVAL:
                        yield {
                            components.chat: conversation.with_answer(text).messages(),
                            components.status: _status(answer, start_time),
                        }
                        update_time = time.monotonic()
            finally:
                self._scheduler.abort(answer)
            if finish_reason is None and not text:
                raise OvisError(STOPPED_EARLY)
            conversation = conversation.with_answer(text)
            status = _status(answer, start_time, finish_reason or "stopped")
        except Exception as error:  # after any of them, the visitor can go on
            problem = str(error) if isinstance(error, OvisError) else FAILED
            if problem == FAILED:
                log.exception("an answer failed")
            conversation = conversation.with_problem(problem)
            status = _status_line(NO_ANSWER)
        yield {
            components.chat: conversation.messages(),
            components.conversation: conversation,
            components.box: gr.MultimodalTextbox(submit_btn=True, stop_btn=False),
            components.status: status,
            components.new_chat: gr.Button(interactive=True),
        }


def sampling_from_controls(temperature: float, top_p: float, top_k: int) -> Sampling:
    """Convert the values of the controls to sampling parameters; top-k 0 and top-p 1 mean off."""
    if not temperature:
        return Sampling()
    return Sampling(temperature, int(top_k) or None, top_p if top_p < 1 else None)


def _checked_index(index: Any, length: int, name: str) -> int:
    """Return an index from a browser; anything but the index of one of `length` items fails."""
    if type(index) is not int or not 0 <= index < length:
        raise gr.Error(f"There is no such {name}.", title="Not sent", print_exception=False)
    return index


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
