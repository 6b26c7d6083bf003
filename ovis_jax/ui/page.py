"""The layout of the page, and the server for it.

The page does not load fonts or scripts from other servers, and it sends no statistics.
"""

import html
import shutil
from pathlib import Path
from typing import Any

from ovis_jax.ui.gradio_isolation import SERVED_DIR  # must come before Gradio

# isort: split
import gradio as gr
from gradio import themes
from gradio.components import Component
from starlette.middleware import Middleware

from ovis_jax.engine.scheduler import Scheduler
from ovis_jax.server.host_check import HostCheckMiddleware
from ovis_jax.ui.conversation import Conversation
from ovis_jax.ui.crop_preview import NO_IMAGES_HTML
from ovis_jax.ui.events import EMPTY_BOX, REMOVE_FROM_BOX, BoxContent, Components, PageEvents
from ovis_jax.ui.security import KnownFilesBlocks, PageSecurityMiddleware

ASSETS = Path(__file__).parents[1] / "assets" / "page"

EXAMPLES = {
    "shapes.png": "Describe the picture.",
    "word.png": "Which word is in the picture?",
    "digit.png": "Welche Ziffer zeigt das Bild?",
    "wide.png": "Where is the green heart?",
}
"""Example images, each with a question. They are not in the training data of ovis-tiny."""

MAX_TOKENS_CHOICES = [64, 128, 256, 512, 1024, 2048]
"""The maximum answer lengths that visitors can choose from, in tokens."""

MAX_FILE_SIZE = "50mb"

SAVE_FILE = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
}"""
"""JavaScript that saves a text as a file, so that the server needs no file."""

UPLOAD_LIFETIME = 24 * 3600
"""Time after which an upload is deleted, in seconds. All uploads are deleted on exit."""


def create_page(scheduler: Scheduler, model_name: str) -> gr.Blocks:
    """Create the page for one model.

    Args:
      scheduler: The engine.
      model_name: Name of the model that is shown to visitors.
    """
    examples = _copy_examples()
    with KnownFilesBlocks(
        title=f"Ovis: {model_name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, UPLOAD_LIFETIME),
    ) as page:
        gr.HTML(
            f"<h1>Ask about your pictures</h1><p>Chat with <b>{html.escape(model_name)}</b>. "
            "Attach one or more pictures and ask questions about them.</p>",
            elem_id="head",
        )
        with gr.Row(elem_id="body"):
            with gr.Column(scale=5, min_width=320):
                chat = _chat(examples)
                box = _text_box()
                with gr.Row(elem_id="foot"):
                    status = gr.HTML(elem_id="note")
                    export = gr.Button("Export", size="sm", scale=0, min_width=80, elem_id="export")
                    new_chat = gr.Button(
                        "New chat", size="sm", scale=0, min_width=100, elem_id="new"
                    )
            with gr.Column(scale=2, min_width=320, elem_id="side"):
                gr.HTML("<h2>What the model sees</h2>")
                preview = gr.HTML(NO_IMAGES_HTML, elem_id="pictures")
                max_partition = gr.Slider(
                    1,
                    9,
                    9,
                    step=1,
                    label="Maximum cells per picture",
                    info="max_partition: fewer cells take fewer tokens",
                    elem_id="partition",
                )
                with gr.Accordion("Generation settings", open=False, elem_id="controls"):
                    system_text, *controls = _generation_controls()
        taken = gr.JSON(EMPTY_BOX | {"number": 0}, visible="hidden")
        removed = gr.Number(0, visible="hidden")
        exported = gr.Textbox(visible="hidden")
        components = Components(
            chat=chat,
            box=box,
            taken=taken,
            last_taken=gr.State(0),
            status=status,
            new_chat=new_chat,
            preview=preview,
            conversation=gr.State(Conversation()),
            previewed=gr.State(None),
        )
        settings = [max_partition, system_text, *controls]
        events = PageEvents(scheduler, components, examples, model_name)
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        unlimited: dict[str, Any] = private | {"concurrency_limit": None}
        conversation = components.conversation
        asking: dict[str, Any] = unlimited | {
            "outputs": [chat, box, taken, components.last_taken, status, new_chat, conversation]
        }
        preview_images: dict[str, Any] = unlimited | {
            "fn": events.preview_images,
            "inputs": [
                box,
                conversation,
                max_partition,
                components.previewed,
                components.last_taken,
                removed,
            ],
            "outputs": [preview, components.previewed, taken, components.last_taken],
            "trigger_mode": "always_last",
        }
        taken.change(None, [box, taken], [box, removed], js=REMOVE_FROM_BOX, **private)
        gr.on([box.change, removed.change, max_partition.change], **preview_images)
        box.submit(events.ask, [box, conversation, *settings], **asking)
        chat.example_select(events.ask_example, [conversation, *settings], **asking)
        chat.retry(events.retry, [conversation, *settings], **asking)
        chat.edit(events.edit, [conversation, *settings], **asking)
        box.stop(events.stop_answer, queue=False, **private)
        undone = [chat, box, status, conversation]
        chat.undo(events.undo, [box, conversation], undone, **private)
        everything = [*undone, preview, components.previewed]
        new_chat.click(events.start_new_chat, None, everything, **private)
        export.click(events.export, [conversation, system_text], exported, **private).success(
            None, exported, js=SAVE_FILE, **private
        )
        page.unload(events.stop_answer)
    page.example_files = frozenset(path for example in examples for path in example["files"])
    box.keep_in_cache.update(page.example_files)  # `delete_cache` must not remove them
    return page


def launch_page_in_thread(
    page: gr.Blocks,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
) -> str:
    """Serve a page in another thread until the page is closed.

    Args:
      page: The page.
      host: Address to listen on.
      port: Port to listen on; None for the first free port starting at 7860.
      auth: User name and password that visitors must enter; None for none.

    Returns:
      The page's URL.

    Raises:
      OSError: The port is already in use, or the host is not this machine.
    """
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        num_workers=0,  # worker processes would lack the middleware
        mcp_server=False,
        run_history=False,
        # The list must not be empty, or Gradio would read an environment variable instead.
        allowed_paths=[str(SERVED_DIR / "examples")],
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        enable_monitoring=False,
        app_kwargs={
            "middleware": [
                Middleware(PageSecurityMiddleware),
                Middleware(HostCheckMiddleware, host=host),
            ]
        },
        theme=_theme(),
        css_paths=ASSETS / "page.css",
        js=(ASSETS / "page.js").read_text(),
    )
    return url


def _copy_examples() -> list[BoxContent]:
    """Copy the example images to the folder that Gradio may serve."""
    folder = SERVED_DIR / "examples"
    folder.mkdir(exist_ok=True)
    return [
        {"text": text, "files": [str(shutil.copyfile(ASSETS / file, folder / file))]}
        for file, text in EXAMPLES.items()
    ]


def _chat(examples: list[BoxContent]) -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        elem_id="chat",
        height=None,
        layout="bubble",
        buttons=["copy"],
        editable="user",
        group_consecutive_messages=False,  # Gradio cannot edit a text in a group with a picture
        feedback_options=None,
        placeholder="Attach a picture below and ask, or try one of these:",
        examples=[
            {"text": example["text"], "files": [*example["files"]], "icon": example["files"][0]}
            for example in examples
        ],
    )


def _text_box() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        show_label=False,
        elem_id="box",
        placeholder="Ask, or attach a picture",
        file_count="multiple",
        file_types=["image"],
        max_plain_text_length=2**31,  # Gradio would make a file of a longer text that is pasted
        autofocus=True,
    )


def _generation_controls() -> list[Component]:
    """Return the controls in the order of the settings of `PageEvents`."""
    return [
        gr.Textbox(
            "",
            label="System text",
            info="instructions for all answers",
            lines=2,
            elem_id="system",
        ),
        gr.Slider(
            0,
            2,
            0,
            step=0.05,
            label="Temperature",
            info="0 always takes the most likely token",
            elem_id="temperature",
        ),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="1 keeps all tokens", elem_id="top-p"),
        gr.Slider(0, 200, 0, step=1, label="Top k", info="0 keeps all tokens", elem_id="top-k"),
        gr.Dropdown(
            MAX_TOKENS_CHOICES,
            value=512,
            label="Maximum number of tokens per answer",
            elem_id="longest",
        ),
        gr.Number(
            0,
            label="Seed",
            info="used with a temperature above 0; each retry adds 1",
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
        # The fonts are on the visitor's machine, so none are downloaded.
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return theme.set(body_text_color_subdued="*neutral_500")  # readable on white
