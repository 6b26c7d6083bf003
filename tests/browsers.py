"""The browser that pages are tested in."""

import importlib.util
import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing() -> list[str]:
    """What must be installed before pages can be tested."""
    packages = [name for name in ("gradio", "playwright") if not importlib.util.find_spec(name)]
    return packages + ([] if CHROMIUM else ["the browser chromium (Debian: apt install chromium)"])
