"""The page as it is laid out and served: a chat about pictures, with Gradio.

Everything it needs comes from the server it stands on: no fonts, no scripts and no counting of
visitors from elsewhere, which a Content-Security-Policy holds the browser to.

Visitors may be strangers, so no file of the host is theirs to read. Gradio keeps what it serves in
a private folder of this process. A browser names a file only to choose among those that were
uploaded and the examples.
"""

import atexit
import html
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

PRIVATE = Path(tempfile.mkdtemp(prefix="ovis-jax-page-")).resolve()
"""A folder that no other user can read and no other program writes to; it ends with the process."""
SERVED = PRIVATE / "served"
"""What Gradio may serve: uploads, and copies of the examples."""
NOTHING = PRIVATE / "nothing"
for _folder in (SERVED, NOTHING):
    _folder.mkdir()
atexit.register(shutil.rmtree, PRIVATE, ignore_errors=True)

# Before Gradio is imported, which reads them.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(SERVED)  # otherwise one that all Gradio programs share
os.environ["GRADIO_EXAMPLES_CACHE"] = str(SERVED / "cached")  # otherwise in the working folder

import gradio as gr  # noqa: E402
from gradio import themes  # noqa: E402
from gradio.components import Component  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from ovis_jax.loading import LoadedOvis  # noqa: E402
from ovis_jax.serving import panel  # noqa: E402
from ovis_jax.serving.gate import KnownHosts  # noqa: E402
from ovis_jax.serving.own_sources import OwnSourcesOnly, WithoutUnused  # noqa: E402
from ovis_jax.serving.talk import Talk  # noqa: E402
from ovis_jax.serving.visits import (  # noqa: E402
    EMPTY,
    Message,
    Visits,
    begin_anew,
    give_back,
)

ASSETS = Path(__file__).parents[1] / "assets" / "page"
EXAMPLES = {
    "shapes.png": "Describe the picture.",
    "word.png": "Which word is in the picture?",
    "digit.png": "Welche Ziffer zeigt das Bild?",
    "wide.png": "Where is the green heart?",
}
"""Pictures that ovis-tiny has not seen in its training, and what to ask about them."""
LONGEST = [64, 128, 256, 512, 1024, 2048]
"""Few lengths of answers to choose from: each is a program of its own."""
LARGEST_FILE = "50mb"
FILES_KEPT = 24 * 3600
"""Seconds that uploaded pictures lie on the server's disk; all go when it ends."""


@contextmanager
def apart() -> Iterator[None]:
    """Let nothing of the user's lie where Gradio takes files from.

    Gradio serves a copy of any file in the working folder or the temporary folder that an event
    handler gives it. No handler here gives it one; within this context none could. The change is
    one of the whole process, so it belongs to a process that does nothing but serve the page.
    """
    before = tempfile.tempdir
    with chdir(NOTHING):
        tempfile.tempdir = str(NOTHING)
        try:
            yield
        finally:
            tempfile.tempdir = before


class Page(gr.Blocks):
    """Blocks that take no file from a browser but those that they know."""

    examples: frozenset[str] = frozenset()
    """Paths of the pictures that the page offers."""

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Prepare what a browser sends for an event; refuse a path that was not given to it.

        Gradio itself takes addresses as well, which it fetches.
        """
        for path in _paths(inputs):
            # Equal to a name that the server has made: nothing is left to resolve.
            known = isinstance(path, str) and (
                path in self.upload_file_set or path in self.examples
            )
            if not known:
                raise gr.Error(
                    "A file is not known to this server; attach it again.",
                    title="Not sent",
                    print_exception=False,
                )
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def _paths(data: Any) -> Iterator[Any]:
    """All that stands for a path in what a browser has sent."""
    if isinstance(data, dict):
        if "path" in data:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _paths(item)


def _offered() -> list[Message]:
    """The examples, as copies that Gradio may serve."""
    folder = SERVED / "examples"
    folder.mkdir(exist_ok=True)
    return [
        {"text": text, "files": [str(shutil.copyfile(ASSETS / file, folder / file))]}
        for file, text in EXAMPLES.items()
    ]


def build(ovis: LoadedOvis, name: str) -> gr.Blocks:
    """Lay the page out for a model that visitors know as `name`."""
    offered = _offered()
    with Page(
        title=f"Ovis: {name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, FILES_KEPT),
    ) as blocks:
        gr.HTML(
            f"<h1>Ask about your pictures</h1><p>You are talking with <b>{html.escape(name)}</b>. "
            "Attach one picture or several, ask, and go on asking.</p>",
            elem_id="head",
        )
        with gr.Row(elem_id="body"):
            with gr.Column(scale=5, min_width=420):
                chat, box, note, new = _conversation(offered)
            with gr.Column(scale=2, min_width=320, elem_id="side"):
                gr.HTML("<h2>What the model sees</h2>")
                shown = gr.HTML(panel.NO_PICTURES, elem_id="pictures")
                partition = gr.Slider(
                    1,
                    9,
                    9,
                    step=1,
                    label="Cells per picture, at most",
                    info="max_partition: fewer cells, fewer tokens",
                    elem_id="partition",
                )
                with gr.Accordion("How it answers", open=False, elem_id="controls"):
                    controls = _controls()
        # The chat is never an input: what a browser sends of it is not to be trusted.
        said, talk, message, seen = map(gr.State, ((), Talk(), EMPTY, None))
        visits = Visits(ovis, offered)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        look: dict[str, Any] = quiet | {
            "fn": visits.look,
            "inputs": [box, talk, partition, seen],
            "outputs": [box, shown, seen],
            "trigger_mode": "always_last",
            "concurrency_limit": None,  # does not wait for answers
        }
        ask: dict[str, Any] = quiet | {
            "fn": visits.ask,
            "inputs": [box, said, talk],
            "outputs": [box, chat, said, talk, message, note, new],
            "concurrency_limit": None,
        }
        answer: dict[str, Any] = quiet | {
            "fn": visits.answer,
            "inputs": [said, talk, message, partition, *controls],
            "outputs": [chat, said, talk, box, note, new],
            "concurrency_limit": 1,
        }
        # Where Gradio refuses a control before `answer` is called, or `answer` itself fails.
        failed: dict[str, Any] = quiet | {
            "fn": give_back,
            "inputs": [said, talk, message],
            "outputs": answer["outputs"],
            "concurrency_limit": None,
        }
        gr.on([box.change, partition.change], **look)
        box.submit(**ask).success(**answer).failure(**failed)
        example = chat.example_select(visits.take_example, None, box, **quiet)
        example.success(**ask).success(**answer).failure(**failed)
        box.stop(visits.stop, queue=False, **quiet)
        anew = [chat, said, talk, box, note, shown, seen]
        gr.on([new.click, chat.clear], begin_anew, None, anew, **quiet)
        blocks.unload(visits.leave)
    blocks.examples = frozenset(path for example in offered for path in example["files"])
    box.keep_in_cache.update(blocks.examples)  # they outlive the uploads
    return blocks


def launch(blocks: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serve a page until it is closed; gives its address.

    Raises:
      OSError: the port is taken, or the host is not one of this machine.
    """
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        num_workers=0,  # other processes, which would not refuse what is refused here
        mcp_server=False,
        run_history=False,
        allowed_paths=[str(SERVED / "examples")],  # not empty: a variable would be read instead
        max_file_size=LARGEST_FILE,
        footer_links=[],
        enable_monitoring=False,
        app_kwargs={
            "middleware": [
                Middleware(OwnSourcesOnly),
                Middleware(KnownHosts, host=host),
                Middleware(WithoutUnused),
            ]
        },
        theme=_theme(),
        css_paths=ASSETS / "page.css",
    )
    return address


def _conversation(
    offered: list[Message],
) -> tuple[gr.Chatbot, gr.MultimodalTextbox, gr.HTML, gr.Button]:
    chat = gr.Chatbot(
        show_label=False,
        elem_id="chat",
        height=None,
        layout="bubble",
        buttons=["copy"],
        feedback_options=None,
        placeholder="Attach a picture below and ask, or begin with one of these:",
        examples=[
            {"text": example["text"], "files": [*example["files"]], "icon": example["files"][0]}
            for example in offered
        ],
    )
    box = gr.MultimodalTextbox(
        show_label=False,
        elem_id="box",
        placeholder="Ask something. Pictures may be attached, dropped or pasted.",
        file_count="multiple",
        file_types=["image"],
        autofocus=True,
    )
    with gr.Row(elem_id="foot"):
        note = gr.HTML(elem_id="note")
        new = gr.Button("New chat", size="sm", scale=0, min_width=110, elem_id="new")
    return chat, box, note, new


def _controls() -> list[Component]:
    """In the order in which `Visits.answer` takes them."""
    return [
        gr.Slider(
            0,
            2,
            0,
            step=0.05,
            label="Temperature",
            info="0 takes the likeliest token",
            elem_id="temperature",
        ),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="1 keeps all", elem_id="top-p"),
        gr.Slider(0, 200, 0, step=1, label="Top k", info="0 keeps all", elem_id="top-k"),
        gr.Dropdown(LONGEST, value=512, label="Longest answer, in tokens", elem_id="longest"),
        gr.Number(
            0,
            label="Seed",
            info="for temperatures above 0",
            precision=0,
            minimum=0,
            maximum=2**32 - 1,
            elem_id="seed",
        ),
    ]


def _theme() -> themes.Base:
    theme = themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        # Of the visitor's machine; nothing is fetched.
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return theme.set(body_text_color_subdued="*neutral_500")  # readable on white
