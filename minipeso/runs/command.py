"""The command line: every field of Config is a flag, and so is every setting of the rivals, shown apart by --help."""
import argparse
import dataclasses
import difflib
import inspect
import re

from minipeso.config import GRID, Config, UsageError, flag, resolve
from minipeso.methods import SETTINGS


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def number(text: str) -> float | tuple[float, ...]:
    """A number; or several, of which validation is to choose (--lambda alone)."""
    values = GRID if text == "auto" else tuple(dict.fromkeys(map(float, text.split(","))))
    return values if len(values) > 1 else values[0]


READERS = {int: int, float: number, str: str, tuple: numbers}  # of a default's type


def from_args(argv: list[str] | None = None, description: str = "") -> Config:
    """Parses the command line (`lam` is --lambda). UsageError suggests the nearest flag for an unknown one."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_flags(parser, Config)
    for title, settings in SETTINGS.items():
        _add_flags(parser.add_argument_group(f"settings of {title}"), settings)
    parser.add_argument("--debug", action="store_true", help="a traceback instead of the three-line message")
    parsed, rest = parser.parse_known_args(argv)
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(rest[0].split("=")[0], known, n=1, cutoff=0.5)
        parser.error(f"unknown argument {rest[0]}" + (f": did you mean {near[0]}?" if near else ""))
    flags = {"rivals": {}}
    for name, value in vars(parsed).items():
        if name != "debug":  # runs/guard.py looks for it
            (flags if name in Config.__dataclass_fields__ else flags["rivals"])[name] = value
    cfg = resolve(flags)
    for settings in SETTINGS.values():
        settings.of(cfg)  # a number out of its bounds is told now
    return cfg


def _add_flags(parser, settings: type) -> None:
    notes = field_notes(settings)
    for field in dataclasses.fields(settings):
        shown = f"{notes[field.name]} [{field.default}]".replace("%", "%%")
        how = dict(dest=field.name, default=argparse.SUPPRESS, help=shown)
        kind = type(field.default)
        if kind is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **how)
        elif kind in READERS:  # the rivals' settings have flags of their own
            parser.add_argument(flag(field.name), type=READERS[kind], metavar=field.name.upper(), **how)


def field_notes(settings: type) -> dict[str, str]:
    """The trailing comment of every field of a dataclass: its meaning and source, once, where it is set."""
    notes = dict(re.findall(r"^    (\w+):.*?# (.*)$", inspect.getsource(settings), re.M))
    return {field.name: notes[field.name] for field in dataclasses.fields(settings)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"cannot read the command line\n{message}\npython {self.prog} --help lists the flags")
