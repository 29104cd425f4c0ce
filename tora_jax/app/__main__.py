"""Starts the page: `python -m tora_jax.app --help`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

MAX_UPLOAD = "50mb"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tora_jax.app", description="A page to draw on.")
    parser.add_argument("--weights", help="release folder; left out: the small model's")
    parser.add_argument("--low_memory", action="store_true", help="parts are on the device only while they are used")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 = on all interfaces")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--user", default="tora", help="with --password")
    parser.add_argument("--password", help="asked for in the browser; also TORA_PASSWORD")
    options = parser.parse_args(argv)
    # Results and uploads lie in a folder of their own, which goes when the page ends; nothing else is served.
    with tempfile.TemporaryDirectory(prefix="tora_app_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            import gradio  # noqa: F401 (only to see whether it is there; page.py uses it)
        except ImportError:
            sys.exit("error: the page needs Gradio: pip install 'tora_jax[app]'")
        from tora_jax.errors import UserError

        try:
            serve(Path(folder), options)
        except (UserError, OSError) as error:
            sys.exit(f"error: {error}")


def serve(folder: Path, options: argparse.Namespace, block: bool = True):
    """Loads the models and starts the server; with `block=False`, returns the page and its address."""
    import tora_jax
    from tora_jax import command_line
    from tora_jax.app import page, studio

    command_line.use_compilation_cache()
    blocks = page.build(
        studio.Studio(tora_jax.load(options.weights, low_memory=options.low_memory), folder / "results")
    )
    password = options.password or os.environ.get("TORA_PASSWORD")
    _, address, _ = blocks.launch(
        server_name=options.host,
        server_port=options.port,
        auth=(options.user, password) if password else None,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[],
        css=page.CSS,
        ssr_mode=False,
        share=False,
        quiet=not block,
        show_error=False,
        footer_links=[],
        prevent_thread_lock=not block,
    )
    return blocks, address


if __name__ == "__main__":
    main()
