"""The command line of an experiment module, whose last two lines are

    if __name__ == "__main__":
        launch.main(globals())

It opens the workdir, sets up logging and calls the module's `run(config, context)`. Every field
of the configuration is an option: `--optimizer.learning-rate 1e-3` is the same as
`--set optimizer.learning_rate=1e-3`, and both are typed by config.py. tyro splits the command line
and prints the help. jax is not imported here, so `--help` is as quick as the module's own imports.
"""

import contextlib
import dataclasses
import dis
import inspect
import json
import logging
import pathlib
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import rich.console
import rich.logging
import tyro

from jaxdistill import config as configs
from jaxdistill import workdir as workdirs

_logger = logging.getLogger(__name__)
_NOT_GIVEN = "\0"
_METAVARS = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", type(None): "none"}
_HELP = ("-h", "--help")
_OURS = ("jaxdistill", "experiments", "__main__")


class UsageError(ValueError):
    """A command line that cannot be understood; one sentence."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What `run` gets beside its configuration."""

    workdir: workdirs.Workdir
    console: rich.console.Console
    preset: str


class Experiment(NamedTuple):
    """What the command line needs of an experiment module; the first preset is the default."""

    name: str
    description: str
    presets: Mapping[str, Any]
    run: Callable[[Any, Context], Any]


class Command(NamedTuple):
    """A command line that was understood."""

    preset: str
    workdir: str
    debug: bool
    config: Any


def main(module: Mapping[str, Any], arguments: Sequence[str] | None = None) -> None:
    """Run the experiment whose globals are `module`; exit with a code if that fails.

    Args:
        module: `globals()` of the experiment: its docstring, `PRESETS` (a dictionary of instances
            of one frozen dataclass; the first is the default) and `run(config, context)`.
        arguments: the command line; by default `sys.argv[1:]`.
    Raises: SystemExit with code 0 after `--help`, 2 for a wrong command line or workdir, 1 for a
        run that its user must correct, 130 when interrupted, 143 when preempted; others as is.
    """
    experiment = _experiment(module)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if set(_HELP) & set(arguments):
            _print_help(experiment, [a for a in arguments if a not in _HELP])
        command = parse(experiment, arguments)
    except ValueError as error:
        _exit(2, str(error))
    _run(experiment, command)


def parse(experiment: Experiment, arguments: Sequence[str]) -> Command:
    """The command that `arguments` ask for; ValueError, one sentence, if they are wrong."""
    options = list(configs.options(next(iter(experiment.presets.values()))))
    parser = _parser(experiment, options)
    given: Any  # an instance of the class that _parser made
    try:
        given, unknown = tyro.cli(
            parser, args=arguments, return_unknown_args=True, console_outputs=False, add_help=False
        )
    except SystemExit:
        # Every option takes any text, so all that tyro can miss is the text.
        raise _missing_value(arguments, options) from None
    if unknown:
        raise _unknown_argument(unknown[0], options)
    texts = {option.key: getattr(given, _field(option.key)) for option in options}
    flags = {key: text for key, text in texts.items() if text != _NOT_GIVEN}
    for override in given.set:
        if (key := override.partition("=")[0]) in flags:
            raise UsageError(f"{key} is given by --set and by {_flag(key)}: keep one of them")
    config = configs.apply_overrides(
        configs.preset(experiment.presets, given.preset),
        [*given.set, *(f"{key}={text}" for key, text in flags.items())],
    )
    workdir = given.workdir
    if workdir == _NOT_GIVEN:
        workdir = _default_workdir(experiment, given.preset)
    return Command(given.preset, workdir, given.debug, config)


# ---- Options and help --------------------------------------------------------------------------


def _experiment(module: Mapping[str, Any]) -> Experiment:
    spec = module.get("__spec__")  # of `python -m`; None when run as a file
    name = spec.name if spec else pathlib.Path(module["__file__"]).stem
    description = inspect.cleandoc(module.get("__doc__") or "")
    return Experiment(name, description, module["PRESETS"], module["run"])


def _default_workdir(experiment: Experiment, preset: str) -> str:
    return f"runs/{experiment.name.removeprefix('experiments.')}-{preset}"


def _parser(experiment: Experiment, options: Sequence[configs.Option]) -> type:
    """A flat dataclass for tyro: the options that every experiment has, then the fields as text."""
    presets = list(experiment.presets)
    choices = f"Configuration to start from: {', '.join(presets)}."
    workdir = _default_workdir(experiment, "PRESET")
    place = "Local folder of the run; the same folder again resumes the run."
    repeatable = tyro.conf.UseAppendAction[tuple[str, ...]]
    fields: list[tuple[str, Any, Any]] = [
        ("preset", _argument("preset", "NAME", choices, presets[0]), presets[0]),
        ("workdir", _argument("workdir", "PATH", place, workdir), _NOT_GIVEN),
        ("set", _argument("set", "KEY=VALUE", "Change a key; repeatable.", kind=repeatable), ()),
        ("debug", _argument("debug", None, "Show the traceback of any error.", kind=bool), False),
    ]
    for key, kind, value, description in options:
        details = _argument(key, _metavar(kind), description, shlex.quote(_written(value)))
        fields.append((_field(key), details, _NOT_GIVEN))
    return dataclasses.make_dataclass("Options", fields, frozen=True)


def _argument(
    name: str, metavar: str | None, help: str, default: str | None = None, kind: Any = str
) -> Any:
    hint = [] if default is None else [f"(default: {default})"]
    text = " ".join(filter(None, [help, *hint]))
    details = tyro.conf.arg(name=name, metavar=metavar, help=text, help_behavior_hint="")
    return Annotated[kind, details, tyro.conf.FlagCreatePairsOff]


def _print_help(experiment: Experiment, arguments: Sequence[str]) -> NoReturn:
    """Every option with its default in the preset that `arguments` choose, else in the first."""
    try:
        config = parse(experiment, arguments).config
    except ValueError:
        config = next(iter(experiment.presets.values()))
    print(experiment.description, end="\n\n")  # tyro would join its lines
    tyro.cli(
        _parser(experiment, list(configs.options(config))),
        args=["--help"],
        prog=f"python -m {experiment.name}",
    )
    raise SystemExit(0)


def _field(key: str) -> str:
    return "field_" + key.replace(".", "__")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _metavar(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (tuple, list):
        return ",".join("..." if a is Ellipsis else _metavar(a) for a in arguments)
    if origin is dict:
        return "JSON"
    if arguments:
        return "|".join(_metavar(a) for a in arguments if not dataclasses.is_dataclass(a))
    return _METAVARS[kind]


def _written(value: Any) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, list) and all(map(_is_word, value)):
        return ",".join(map(_written, value))
    if isinstance(value, list | dict):
        return json.dumps(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _is_word(value: Any) -> bool:
    """Whether a value may stand between the commas of a list, so that no JSON is needed."""
    if isinstance(value, str):
        return re.fullmatch(r"[\w.*/:+-]+", value) is not None
    return not isinstance(value, list | dict)


# ---- Wrong command lines -----------------------------------------------------------------------


def _flags(options: Sequence[configs.Option]) -> list[str]:
    return ["--preset", "--workdir", "--set", "--debug", *(_flag(o.key) for o in options)]


def _unknown_argument(argument: str, options: Sequence[configs.Option]) -> UsageError:
    if not argument.startswith("-"):
        return UsageError(f"unexpected argument {argument!r}: write options as --name value")
    name = argument.partition("=")[0]
    near = configs.nearest(name.lstrip("-").replace("_", "-"), [f[2:] for f in _flags(options)])
    advice = f"did you mean --{near}?" if near else "--help lists them"
    return UsageError(f"unknown option {name}: {advice}")


def _missing_value(arguments: Sequence[str], options: Sequence[configs.Option]) -> UsageError:
    flags = set(_flags(options)) - {"--debug"}
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        if argument.replace("_", "-") in flags and following.startswith("-"):
            return UsageError(
                f"{argument} needs a value (one that begins with a dash is written {argument}=-...)"
            )
    return UsageError(f"cannot read the command line {shlex.join(arguments)}: see --help")


# ---- Running -----------------------------------------------------------------------------------


def _run(experiment: Experiment, command: Command) -> None:
    console = rich.console.Console()
    _log_to(console)
    with contextlib.ExitStack() as stack:
        workdir = workdirs.open(
            command.workdir,
            experiment=experiment.name,
            preset=command.preset,
            config=configs.to_dict(command.config),
        )
        try:
            context = Context(stack.enter_context(workdir), console, command.preset)
        except (workdirs.WorkdirError, PermissionError) as error:
            _exit(2, str(error))
        _logger.info("%s, preset %s, in %s", experiment.name, command.preset, command.workdir)
        try:
            experiment.run(command.config, context)
        except KeyboardInterrupt:
            _exit(130, "interrupted: the same command goes on from the last checkpoint")
        except SystemExit as stop:
            # train.preemption.Preempted says what was saved; its code is 128 + the signal's number.
            if message := getattr(stop, "message", ""):
                print(f"{message}: the same command goes on from there", file=sys.stderr)
            raise
        except Exception as error:
            if command.debug or not _is_for_the_user(error):
                raise
            _exit(1, f"{error} (--debug shows where)")


def _log_to(console: rich.console.Console) -> None:
    """Our messages from INFO up, others from WARNING up, and the chatty ones only as errors."""
    handler = rich.logging.RichHandler(console=console, show_path=False, log_time_format="%X")
    handler.addFilter(lambda record: record.levelno >= _threshold(record.name))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)


def _threshold(logger: str) -> int:
    if _package(logger) in ("absl", "grain", "orbax"):
        return logging.ERROR
    return logging.INFO if _package(logger) in _OURS else logging.WARNING


def _is_for_the_user(error: Exception) -> bool:
    """Whether a `raise` of our own refused its input; what a library raises is a bug to trace."""
    if not isinstance(error, ValueError | OSError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    # Functions written in C have no frame: their errors seem to come from our line that calls them.
    instruction = last.tb_frame.f_code.co_code[last.tb_lasti]
    return (
        instruction == dis.opmap["RAISE_VARARGS"]
        and _package(last.tb_frame.f_globals.get("__name__", "")) in _OURS
    )


def _package(module: str) -> str:
    return module.partition(".")[0]


def _exit(code: int, sentence: str) -> NoReturn:
    print(f"error: {sentence}" if code in (1, 2) else sentence, file=sys.stderr)
    raise SystemExit(code)
