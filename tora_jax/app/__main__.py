"""Starts the page: `python -m tora_jax.app --help`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import tora_jax
from tora_jax import command_line, programs
from tora_jax.errors import UserError

MAX_UPLOAD = "50mb"
SESSIONS = 50  # that Gradio remembers, those of closed tabs among them; the page keeps nothing there


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m tora_jax.app", "A page to draw on.")
    parser.add_argument("--weights", help="release folder; left out: the small model's")
    parser.add_argument("--low_memory", action="store_true", help="parts are on the device only while they are used")
    parser.add_argument("--eight_bit", action="store_true", help="kernels of the released Tora's denoiser in 8 bits")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 = on all interfaces")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--user", default="tora", help="with --password")
    parser.add_argument("--password", help="asked for in the browser; also TORA_PASSWORD")
    options = parser.parse_args(argv[1:])
    # Results and uploads lie in a folder of their own, which goes when the page ends; nothing else is served.
    with tempfile.TemporaryDirectory(prefix="tora_app_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        if importlib.util.find_spec("gradio") is None:
            raise UserError("the page needs Gradio: pip install 'tora_jax[app]'")
        serve(Path(folder), options)


def serve(folder: Path, options: argparse.Namespace, block: bool = True):
    """Loads the models and starts the server; with `block=False`, returns the page and its address."""
    from tora_jax.app import page, studio  # Gradio reads its environment when it is imported

    command_line.use_compilation_cache()
    models = tora_jax.load(options.weights, low_memory=options.low_memory, eight_bit=options.eight_bit)
    made = studio.Studio(models, folder / "results")
    threading.Thread(target=made.warm_up, daemon=True).start()
    blocks = page.build(made, folder)
    password = options.password or os.environ.get("TORA_PASSWORD")
    _, address, _ = blocks.launch(
        server_name=options.host,
        server_port=options.port,
        auth=(options.user, password) if password else None,
        max_file_size=MAX_UPLOAD,
        state_session_capacity=SESSIONS,
        allowed_paths=[],
        css=page.CSS,
        theme=page.THEME,
        ssr_mode=False,
        share=False,
        quiet=not block,
        show_error=False,
        footer_links=[],
        prevent_thread_lock=not block,
    )
    return blocks, address


if __name__ == "__main__":
    programs.keep()
    command_line.run(main, ["app", *sys.argv[1:]], "the page is closed")
