"""What the page does when a visitor attaches a picture, asks, stops or begins anew."""

import html
import logging
import threading
import time
from collections.abc import Iterator
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


class Visits:
    """All visitors of one model; they take turns, and each can stop its own answer."""

    def __init__(self, ovis: LoadedOvis):
        self._ovis = ovis
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

    def ask(self, message: Message, chat: list[Any], talk: Talk, request: gr.Request) -> tuple:
        """Move what is in the text box into the conversation.

        Gives the text box, the chat, the conversation, the message, the note and the new button.
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
        said: list[Any] = [
            {"role": "user", "content": {"path": path, "alt_text": "a picture"}}
            for path in message["files"]
        ]
        said.append({"role": "user", "content": message["text"].strip()})
        waiting = [*chat, *said, _answer("…")]
        box = gr.MultimodalTextbox(value=EMPTY, submit_btn=False, stop_btn=True)
        return box, waiting, asked, message, panel.note(READING), gr.Button(interactive=False)

    def answer(
        self,
        chat: list[Any],
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

        Gives the chat, the conversation, the text box, the note and the new button.
        """
        stop = self._stops.setdefault(str(request.session_hash), threading.Event())
        same, before = gr.skip(), chat[:-1]  # without the "…"
        step, shown = None, 0.0
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
                        yield [*before, _answer(step.text)], same, same, panel.progress(step), same
                        shown = time.monotonic()
        except OvisError as error:
            yield give_back(chat, talk, message, str(error))
        except Exception:  # whatever a device may raise
            log.exception("an answer on the page failed")
            yield give_back(chat, talk, message, FAILED)
        else:
            text = step.text if step else ""
            note = panel.progress(step, STOPPED if stop.is_set() else "") if step else ""
            chat, talk = [*before, _answer(text or "…")], talk.answered(text)
            yield chat, talk, _ready(EMPTY), note, _new()

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


def give_back(chat: list[Any], talk: Talk, message: Message, why: str = NOT_BEGUN) -> tuple:
    """Put a question that gets no answer into the text box again, with why in the chat.

    Gives what `Visits.answer` gives.
    """
    said = [*chat[:-1], _answer(f"⚠️ {html.escape(why, quote=False)}")]
    return said, talk.take_back(), _ready(message), panel.note(LEFT_OUT), _new()


def take_example(chosen: gr.SelectData) -> Message:
    """Put an example that was clicked into the text box."""
    return {
        "text": chosen.value["text"],
        "files": [file["path"] for file in chosen.value["files"]],
    }


def begin_anew() -> tuple:
    """Give the chat, conversation, text box, note, panel and its origin of a new conversation."""
    return [], Talk(), EMPTY, "", panel.NO_PICTURES, None


def _ready(message: Message) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(value=message, submit_btn=True, stop_btn=False)


def _new() -> gr.Button:
    return gr.Button(interactive=True)


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
