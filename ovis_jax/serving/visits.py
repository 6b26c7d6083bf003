"""What the page does when a visitor attaches a picture, asks, stops or begins anew."""

import html
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr

from ovis_jax.answering import Answerer
from ovis_jax.errors import OvisError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.loading import LoadedOvis
from ovis_jax.serving import panel
from ovis_jax.serving.talk import Talk, open_files

SHOWN_EVERY = 0.05
"""Seconds between two changes of the page; each sends the conversation."""
EMPTY = {"text": "", "files": []}
READING = "Reading ... (the first prompt of a new length takes longer: it is compiled once)"
LEFT_OUT = "This question is not part of the conversation; it stands in the box again."
STOPPED = "Stopped. "
FAILED = "The model failed; the log of this server says how."
NOT_BEGUN = "The model was not asked; the message at the top says why."

log = logging.getLogger(__name__)

Message = dict[str, Any]
"""What the text box holds: "text", and the paths of "files"."""
Said = tuple[dict[str, Any], ...]
"""The messages that the chat shows. The server keeps them: a browser that sent them back could
name any file in them, and Gradio would serve a copy of it."""


class Visits:
    """All visitors of one model; they take turns, and each can stop its own answer.

    Args:
      ovis: the model.
      examples: messages to begin with, in the order in which the chat offers them.
    """

    def __init__(self, ovis: LoadedOvis, examples: Sequence[Message]):
        self._ovis, self._examples = ovis, examples
        self._stops: dict[str, threading.Event] = {}

    def look(self, message: Message, talk: Talk, max_partition: int, seen: Any) -> tuple:
        """Show the pictures as they will be cut; what is no picture leaves the text box.

        Gives the text box, the panel, and what the panel was made of.
        """
        now = tuple(message["files"]), len(talk.images), max_partition
        if now == seen:  # only the text has changed
            return gr.skip(), gr.skip(), gr.skip()
        opened, faults = open_files(message["files"])
        box = gr.skip()
        if faults:
            box = message | {"files": [path for path, _ in opened]}
            now = tuple(box["files"]), *now[1:]
        images = [*talk.images, *(image for _, image in opened)]
        shown, more = panel.pictures(self._ovis.processor, images, int(max_partition))
        for fault in [*faults, *more]:
            gr.Warning(html.escape(fault), title="Not a picture to ask about")
        return box, shown, now

    def take_example(self, chosen: gr.SelectData) -> Message:
        """Put an example that was clicked into the text box.

        A browser says which one, and nothing else of what it sends is used.
        """
        index = chosen.index
        if type(index) is not int or not 0 <= index < len(self._examples):
            raise gr.Error("There is no such example.", title="Not sent", print_exception=False)
        return self._examples[index]

    def ask(self, message: Message, said: Said, talk: Talk, request: gr.Request) -> tuple:
        """Move what is in the text box into the conversation.

        Gives the text box, the chat, what it shows, the conversation, the message, the note and
        the new button.
        """
        opened, faults = open_files(message["files"])
        try:
            if faults:
                raise OvisError(faults[0])
            asked = talk.ask(message["text"], [image for _, image in opened])
        except OvisError as error:
            text = html.escape(str(error))
            raise gr.Error(text, title="Not sent", print_exception=False) from None
        self._stops[str(request.session_hash)] = threading.Event()
        pictures = (
            {"role": "user", "content": {"path": path, "alt_text": "a picture"}}
            for path in message["files"]
        )
        said = (*said, *pictures, {"role": "user", "content": message["text"].strip()})
        box = gr.MultimodalTextbox(value=EMPTY, submit_btn=False, stop_btn=True)
        note, new = panel.note(READING), gr.Button(interactive=False)
        return box, [*said, _answer("…")], said, asked, message, note, new

    def answer(
        self,
        said: Said,
        talk: Talk,
        message: Message,
        max_partition: int,
        temperature: float,
        top_p: float,
        top_k: int,
        max_new_tokens: int,
        seed: int | None,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Answer the last question, until the model or the visitor stops.

        Gives the chat, what it shows, the conversation, the text box, the note and the new button.
        """
        stop = self._stops.setdefault(str(request.session_hash), threading.Event())
        same, step, shown = gr.skip(), None, 0.0
        try:
            answerer = Answerer(
                self._ovis,
                choose(temperature, top_p, top_k),
                int(seed or 0),
                int(max_new_tokens),
                int(max_partition),
                control=False,  # visitors may be strangers
            )
            with closing(answerer(talk.turns, talk.images)) as steps:
                for step in steps:
                    if stop.is_set():
                        break
                    if time.monotonic() - shown > SHOWN_EVERY:
                        chat, note = [*said, _answer(step.text)], panel.progress(step)
                        yield chat, same, same, same, note, same
                        shown = time.monotonic()
        except OvisError as error:
            yield give_back(said, talk, message, str(error))
        except Exception:  # whatever a device may raise
            log.exception("an answer on the page failed")
            yield give_back(said, talk, message, FAILED)
        else:
            text = step.text if step else ""
            note = panel.progress(step, STOPPED if stop.is_set() else "") if step else ""
            said = (*said, _answer(text or "…"))
            yield list(said), said, talk.answered(text), _ready(EMPTY), note, _new()

    def stop(self, request: gr.Request) -> None:
        """End the visitor's answer: the button was pressed."""
        if event := self._stops.get(str(request.session_hash)):
            event.set()

    def leave(self, request: gr.Request) -> None:
        """End the visitor's answer and forget the visitor: the page was left."""
        if event := self._stops.pop(str(request.session_hash), None):
            event.set()


def choose(temperature: float, top_p: float, top_k: int) -> Sampling:
    """The controls as `Sampling`; a step that does nothing is left out of the program."""
    if not temperature:
        return Sampling()
    return Sampling(temperature, int(top_k) or None, top_p if top_p < 1 else None)


def give_back(said: Said, talk: Talk, message: Message, why: str = NOT_BEGUN) -> tuple:
    """Put a question that gets no answer into the text box again, with why in the chat.

    Gives what `Visits.answer` gives.
    """
    said = (*said, _answer(f"⚠️ {html.escape(why, quote=False)}"))
    return list(said), said, talk.take_back(), _ready(message), panel.note(LEFT_OUT), _new()


def begin_anew() -> tuple:
    """Begin a new conversation.

    Gives the chat, what it shows, the conversation, the text box, the note, the panel and its
    origin.
    """
    return [], (), Talk(), EMPTY, "", panel.NO_PICTURES, None


def _ready(message: Message) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(value=message, submit_btn=True, stop_btn=False)


def _new() -> gr.Button:
    return gr.Button(interactive=True)


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
