"""What all commands share."""

import pytest

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
