"""The web UI: a Gradio page for chatting with a model about images in the browser."""
