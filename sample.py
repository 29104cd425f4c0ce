"""From a prompt and drawn trajectories to an mp4: `python sample.py --help`."""

import signal

# Until the libraries are loaded Ctrl-C just ends the process: raised inside their imports it would be a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from tora_jax.sampling.__main__ import sample

if __name__ == "__main__":
    sample()
