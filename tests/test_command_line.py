"""What all commands share."""

import re
import subprocess
import sys

import pytest

from tests.training_runs import ROOT
from tora_jax import command_line


def run(argv, capsys):
    """The exit code and what was written to stderr, of a command with one flag."""

    def main(argv, check_interrupt):
        parser = command_line.Parser(prog="paint")
        parser.add_argument("--size", type=int, required=True)
        print(parser.parse_args(argv[1:]).size)

    try:
        command_line.run(main, argv)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--size=wide"], ["--size=3", "--colour=red"]])
def test_a_mistake_in_a_flag_is_one_line(argv, capsys):
    code, err = run(["paint", *argv], capsys)
    assert code == 2
    assert err.startswith("paint: error: ")
    assert err.endswith("; see paint --help\n")
    assert err.count("\n") == 1


def test_help_is_no_mistake(capsys):
    code, err = run(["paint", "--help"], capsys)
    assert (code, err) == (0, "")


def test_right_flags_run_the_command(capsys):
    assert run(["paint", "--size=3"], capsys) == (0, "")


HUNG = """
import sys, threading, time
from tora_jax import command_line
from tora_jax.errors import UserError

def main(argv, check_interrupt):
    for _ in range(3):  # in time, each time
        command_line.end_if_hung(2)
        time.sleep(0.8)
    print("went on", flush=True)
    if argv[1] == "hangs":
        threading.Event().wait()
    if argv[1] == "fails":
        threading.Thread(target=threading.Event().wait).start()  # which an orderly exit would wait for
        raise UserError("no paint")

command_line.run(main, ["paint", *sys.argv[1:]], alone=True)
time.sleep(2.2)
"""


@pytest.mark.parametrize(
    ("does", "code", "said"),
    [("hangs", 1, r"Timeout \(0:00:02.* in main\n.*"), ("fails", 2, "paint: error: no paint\n"), ("ends", 0, "")],
)
def test_a_process_that_hangs_ends(does, code, said):
    command = [sys.executable, "-c", HUNG, does]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert (done.returncode, done.stdout) == (code, "went on\n")
    assert re.fullmatch(said, done.stderr, re.DOTALL)
