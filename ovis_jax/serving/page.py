"""The page as it is laid out and served: a chat about pictures, with Gradio.

Everything it needs comes from the server it stands on: no fonts, no scripts and no counting of
visitors from elsewhere, which a Content-Security-Policy holds the browser to.
"""

import html
import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported, which reads it

import gradio as gr  # noqa: E402
from gradio import themes  # noqa: E402
from gradio.components import Component  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from ovis_jax.loading import LoadedOvis  # noqa: E402
from ovis_jax.serving import panel  # noqa: E402
from ovis_jax.serving.own_sources import OwnSourcesOnly  # noqa: E402
from ovis_jax.serving.talk import Talk  # noqa: E402
from ovis_jax.serving.visits import (  # noqa: E402
    EMPTY,
    Visits,
    begin_anew,
    give_back,
    take_example,
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


def build(ovis: LoadedOvis, name: str) -> gr.Blocks:
    """Lay the page out for a model that visitors know as `name`."""
    with gr.Blocks(
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
                chat, box, note, new = _conversation()
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
        talk, message, seen = gr.State(Talk()), gr.State(EMPTY), gr.State(None)
        visits = Visits(ovis)
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
            "inputs": [box, chat, talk],
            "outputs": [box, chat, talk, message, note, new],
            "concurrency_limit": None,
        }
        answer: dict[str, Any] = quiet | {
            "fn": visits.answer,
            "inputs": [chat, talk, message, partition, *controls],
            "outputs": [chat, talk, box, note, new],
            "concurrency_limit": 1,
        }
        # Where Gradio refuses a control before `answer` is called, or `answer` itself fails.
        failed: dict[str, Any] = quiet | {
            "fn": give_back,
            "inputs": [chat, talk, message],
            "outputs": answer["outputs"],
            "concurrency_limit": None,
        }
        gr.on([box.change, partition.change], **look)
        box.submit(**ask).success(**answer).failure(**failed)
        example = chat.example_select(take_example, None, box, **quiet)
        example.success(**ask).success(**answer).failure(**failed)
        box.stop(visits.stop, queue=False, **quiet)
        anew = [chat, talk, box, note, shown, seen]
        gr.on([new.click, chat.clear], begin_anew, None, anew, **quiet)
        blocks.unload(visits.leave)
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
        allowed_paths=[str(ASSETS)],
        max_file_size=LARGEST_FILE,
        footer_links=[],
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(OwnSourcesOnly)]},
        theme=_theme(),
        css_paths=ASSETS / "page.css",
    )
    return address


def _conversation() -> tuple[gr.Chatbot, gr.MultimodalTextbox, gr.HTML, gr.Button]:
    chat = gr.Chatbot(
        show_label=False,
        elem_id="chat",
        height=None,
        layout="bubble",
        buttons=["copy"],
        feedback_options=None,
        placeholder="Attach a picture below and ask, or begin with one of these:",
        examples=[
            {"text": text, "files": [str(ASSETS / file)], "icon": str(ASSETS / file)}
            for file, text in EXAMPLES.items()
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
