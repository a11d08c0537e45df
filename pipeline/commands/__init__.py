"""The command line: one file a command, each parses, calls and prints.

``main`` turns every :class:`~pipeline.errors.TlpipeError` into one message and an exit code.
A command's module is imported only when it runs, and heavy libraries only inside it.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from io import TextIOWrapper

import click

from pipeline import __version__
from pipeline.errors import EXIT_INTERRUPTED, ResourceError, TlpipeError

COMMANDS = {
    "demo": "See the whole flow on a small built-in data set.",
    "extract": "Embed images with a frozen backbone into a feature store.",
    "fit-head": "Fit a classifier head on stored features.",
    "sweep": "Try many settings of one or more heads; keep the best of each.",
    "bench-heads": "Compare every kind of head: one table, one page.",
    "finetune": "Train the backbone itself, or its last blocks, on the images.",
    "compare": "Frozen features against fine-tuning: one table and a verdict.",
    "predict": "Classify new images with a fitted head.",
    "inspect": "Show what a feature store or a run holds.",
    "ls": "List the stores and runs in the cache.",
    "verify": "Check a feature store byte by byte, and set damage aside.",
    "relabel": "Change labels, splits and other columns without embedding again.",
    "pack": "Put a feature store into one ordinary HDF5 file.",
    "unpack": "Make a feature store of a packed file again.",
    "export-features": "Write features and labels as .npy, Parquet or CSV.",
    "compact": "Merge a store's small shards and drop rows that nothing uses.",
    "gc": "Find what in the cache is left over, unreachable or old.",
    "backbones": "List the backbones that can be used.",
}


class LazyGroup(click.Group):
    """Lists commands from a table and imports one only to run it or show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order in which they are usually needed."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in COMMANDS:
            return None
        module = import_module(f"pipeline.commands.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tlpipe")
def cli() -> None:
    """Pay for the backbone once, then everything else is cheap.

    Embed a folder of images with a frozen network, once; then fit, compare and use
    classifier heads on the stored features in seconds.

    \b
    First steps:
      tlpipe demo                          see it work, no download needed
      tlpipe extract photos/               class-per-folder images -> a feature store
      tlpipe fit-head cache/photos/…       features -> a head, scored on held-out images
      tlpipe predict runs/… new.jpg        what is in a new image

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some samples were skipped,
    4 bad data or store, 5 out of a resource, 6 locked by another process, 130 interrupted.
    """


# Errors of files that no code can foresee wherever it looks at one.
_OF_THE_MACHINE = {
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.ESTALE, errno.EROFS,
}  # fmt: skip


def main() -> None:
    """Run the command line and leave with its exit code."""
    # OpenMP's threads wait for each other by spinning unless told otherwise before torch is
    # imported. Beside decoding threads or any other busy process that costs a multiple: measured
    # on two cores with one busy neighbour, 25 images/s spinning and 123 asleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A store may come from a stranger: HDF5 must not look for plugins that its files ask for.
    os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    try:
        with cli.make_context("tlpipe", sys.argv[1:]) as context:
            code = cli.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Exit as end:
        code = end.exit_code
    except SystemExit as end:
        code = end.code
    except TlpipeError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        # Of several processes that torchrun started, one says what all find wrong.
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
            error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        # Threads that still compute would end an ordinary exit with an abort.
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone: not a failure, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = error.filename or "the output or a temporary file"
        click.echo(f"Error: {where}: {error.strerror}.", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ResourceError.exit_code
    code = code if isinstance(code, int) else 0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Threads by which processes talked can outlive their group, and would end an ordinary exit
        # with an abort.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
