"""The ``mosa`` command line: one table of all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_mosa import __version__
from megatron_mosa.cluster.doctor.command import doctor
from megatron_mosa.cluster.slurm.command import submit
from megatron_mosa.cluster.status import status
from megatron_mosa.commands import checkpoint, config, data
from megatron_mosa.commands.pretrain import pretrain
from megatron_mosa.entry import keep_freed_memory
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import USAGE_ERROR
from megatron_mosa.tools.bench.commands import bench
from megatron_mosa.tools.comparison.command import compare
from megatron_mosa.tools.decoding.commands import cache_report, decode_bench, generate
from megatron_mosa.tools.evaluation.command import evaluate
from megatron_mosa.tools.grid import commands as grid
from megatron_mosa.tools.scaling.commands import isoflop, sweep

Command = Callable[..., None]


def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@dataclass(frozen=True)
class Group:
    """A group of commands.

    Attributes:
        help: its description.
        callback: called before any command of the group.
        runs_alone: whether ``callback`` is called without a command, too.
        default: the command that is meant if the first argument names none of the others, as in ``mosa isoflop FILE``.
    """

    help: str
    commands: dict[str, Command | Group]
    callback: Command | None = None
    runs_alone: bool = False
    default: Command | None = None


COMMANDS = Group(
    "Pretrain, convert, evaluate and decode MoSA language models, and prepare their data and jobs.",
    {
        "pretrain": pretrain,
        "data": Group(
            "Build, verify and inspect datasets.",
            {
                "build": data.build,
                "index": data.index,
                "verify": data.verify_dataset,
                "inspect": data.inspect_dataset,
                "sample": data.sample,
            },
        ),
        "config": Group(
            "Show, compare and list configurations.",
            {"show": config.show, "diff": config.diff, "list": config.list_configurations},
        ),
        "checkpoint": Group(
            "Inspect and convert checkpoints, in one process without a GPU.",
            {
                "inspect": checkpoint.inspect_checkpoint,
                "export": checkpoint.export_checkpoint,
                "import": checkpoint.import_checkpoint,
                "reshard": checkpoint.reshard_checkpoint,
                "causalize": checkpoint.causalize_checkpoint,
                "verify": checkpoint.verify_checkpoint,
            },
            keep_freed_memory,
        ),
        "evaluate": evaluate,
        "generate": generate,
        "cache-report": cache_report,
        "decode-bench": decode_bench,
        "bench": bench,
        "isoflop": Group(
            "Solve for numbers of heads at equal FLOPs, or train a grid of such models.",
            {"run": grid.run, "match": grid.match},
            default=isoflop,
        ),
        "report": grid.report,
        "sweep": sweep,
        "compare": compare,
        "submit": submit,
        "status": status,
        "doctor": doctor,
    },
    version,
    runs_alone=True,
)


_DEFAULT = "default"


_WORDS = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_parsing": "a number",
}
"""What pydantic expected, by its name of the error."""


class _WithDefault(TyperGroup):
    """A group that stands for its default command if the first argument names none of its commands."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        command = super() if args and args[0] in self.commands else self.commands[_DEFAULT]
        return command.make_context(info_name, args, parent, **extra)


def build_app(group: Group) -> typer.Typer:
    """Return the Typer app of a group and all groups below it."""
    app = typer.Typer(help=group.help, no_args_is_help=True)
    if group.default is not None:
        app = typer.Typer(help=group.help, cls=_WithDefault)
        app.command(_DEFAULT, hidden=True)(group.default)
    if group.callback is not None:
        app.callback(invoke_without_command=group.runs_alone)(group.callback)
    for name, command in group.commands.items():
        if isinstance(command, Group):
            app.add_typer(build_app(command), name=name)
        else:
            app.command(name)(command)
    return app


app = build_app(COMMANDS)


def command_line() -> object:
    """Run the command of the process's arguments; return its exit code.

    Raises:
        UserError: an unknown command or option, or a missing or malformed argument.
    """
    try:
        return app(prog_name="mosa", standalone_mode=False)
    except Exception as error:
        if (format_message := getattr(error, "format_message", None)) is None:  # not an error of Typer's
            raise
        if not (message := str(format_message()).strip().rstrip(".")):
            return USAGE_ERROR  # a group without a command has shown its help
        command = getattr(getattr(error, "ctx", None), "command_path", None) or _command_of(sys.argv[1:])
        message = _with_value(error) or message
    raise UserError(f"{message}{' See' if message.endswith('?') else '; see'} {command} --help")


def _with_value(error: Exception) -> str:
    """Return the message of a refused value with the value in it, which Typer leaves out, or "" for other errors."""
    param, errors = getattr(error, "param", None), getattr(error.__cause__, "errors", None)  # the cause is pydantic's
    if param is None or errors is None:
        return ""
    refused = errors()[0]
    name = max(param.opts, key=len)
    name = name if name.startswith("-") else param.metavar or name
    return f"{name} must be {_WORDS.get(refused['type'], refused['msg'])}, got {refused['input']!r}"


def _command_of(arguments: list[str]) -> str:
    """Return the command that arguments begin with, such as "mosa data build"; errors of the parser do not name it."""
    words, commands = ["mosa"], COMMANDS.commands
    for word in arguments:
        command = commands.get(word)
        if command is None:
            break
        words.append(word)
        commands = command.commands if isinstance(command, Group) else {}
    return " ".join(words)
