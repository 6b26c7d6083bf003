"""OpenAI's chat-completions API over HTTP, on top of the engine."""
