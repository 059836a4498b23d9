"""The command line. Command files import what is heavy only when they run, so `orchestra --help` is fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from orchestra.cli import bench, data, demo, engines, eval, run, strategies, tasks, train
from orchestra.errors import OrchestraError

app = typer.Typer(
    name="orchestra",
    help="One language model thinking in parallel: threads that fork, race, join, resample and merge.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.command)
app.command("run")(run.command)
app.command("eval")(eval.command)
app.command("tasks")(tasks.command)
app.command("strategies")(strategies.command)
app.command("engines")(engines.command)
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.add_typer(bench.app, name="bench")


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    # The docstring would replace the help text of the whole program; `main` has taken --debug out before this.
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; default: those of this process.

    Returns:
        The exit code: 0, 1 for a failure, 2 for wrong use, 130 for an interrupt. Errors are one line on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    words = [word for word in options if word != "--debug"] + words[len(options) :]
    try:
        code = app(words, prog_name="orchestra", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # how typer reports a KeyboardInterrupt
            _say("interrupted")
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            raise
        return _report(error)


def _report(error: BaseException) -> int:
    """Print an error as one line; returns the exit code."""
    if isinstance(error, BaseExceptionGroup):
        from orchestra.concurrency import first_error

        error = first_error(error)
    if isinstance(error, OrchestraError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        _say("interrupted")
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone (`orchestra tasks | head -1`); nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if hasattr(error, "format_message"):  # a wrong option: an exception of typer, or of click under older typers
        words = error.format_message()
        # `orchestra` alone prints its help and raises an error without a message.
        if words:
            _say(f"{words[0].lower()}{words[1:]}")
        return int(getattr(error, "exit_code", 2))
    _say(f"internal error: {type(error).__name__}: {error} (--debug shows where)")
    return 1


def _say(message: str) -> None:
    print(f"orchestra: {' '.join(message.split())}", file=sys.stderr)
