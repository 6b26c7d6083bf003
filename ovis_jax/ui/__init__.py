"""The Gradio page: chat with a model about images in the browser."""
