"""How a program starts: its own flags, its help, and one line for bad input. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags

from qos_jax.errors import InputError

_WIDTH = 100  # columns of the help

Main = Callable[[flags.FlagValues], None]


@dataclasses.dataclass(frozen=True)
class FlagGroup:
    """Defines flags under one heading of the help."""

    values: flags.FlagValues
    title: str

    def string(self, name: str, default: str | None, text: str, **options: Any) -> None:
        """Defines a flag that holds text."""
        flags.DEFINE_string(name, default, text, self.values, module_name=self.title, **options)

    def integer(self, name: str, default: int | None, text: str, lower: int | None = None, upper: int | None = None,
                **options: Any) -> None:  # fmt: skip
        """Defines a flag that holds a whole number."""
        flags.DEFINE_integer(name, default, text, lower, upper, self.values, module_name=self.title, **options)

    def number(self, name: str, default: float | None, text: str, lower: float | None = None,
               upper: float | None = None) -> None:  # fmt: skip
        """Defines a flag that holds a number."""
        flags.DEFINE_float(name, default, text, lower, upper, self.values, module_name=self.title)

    def boolean(self, name: str, default: bool | None, text: str) -> None:
        """Defines a flag that is on or off."""
        flags.DEFINE_bool(name, default, text, self.values, module_name=self.title)

    def choice(self, name: str, default: str | None, values: Sequence[str], text: str) -> None:
        """Defines a flag that holds one of some words."""
        flags.DEFINE_enum(name, default, list(values), text, self.values, module_name=self.title)

    def texts(self, name: str, default: Sequence[str] | None, text: str) -> None:
        """Defines a flag that holds texts with commas between them."""
        flags.DEFINE_list(name, None if default is None else list(default), text, self.values, module_name=self.title)

    def repeated(self, name: str, text: str) -> None:
        """Defines a flag that may be given several times."""
        flags.DEFINE_multi_string(name, [], text, self.values, module_name=self.title)


def run_program(
    define: Callable[[flags.FlagValues], None],
    main: Main,
    *,
    name: str,
    summary: str,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parses the flags, runs the program and exits: 0 when it is done, 2 with one line where its input is not usable.

    Args:
      define: defines the program's flags.
      main: the program.
      name: how it is called, for its help.
      summary: one sentence, for its help.
      arguments: of the command line without the program's name; those of this process by default.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    values = flags.FlagValues()
    define(values)
    try:
        if {"--help", "-h", "-help", "--helpfull"}.intersection(arguments):
            print(help_text(values, name, summary), flush=True)
            sys.exit(0)
        parse(values, arguments)
        main(values)
    except InputError as error:
        sys.exit(_refused(str(error)))
    except BrokenPipeError:  # whoever reads has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(_refused(f"{error.filename or 'output'} cannot be written: {error.strerror}"))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


def parse(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Sets flags from arguments, of which ``--flagfile=FILE`` stands for those in a file.

    Raises:
      InputError: a flag is unknown, or its value is not legal.
    """
    try:
        # --resume alone is --resume=yes; absl has no flag that may do without its value but booleans.
        rest = values(["", *("--resume=yes" if each == "--resume" else each for each in arguments)])
    except (flags.Error, OSError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; all arguments are flags, --NAME=VALUE")


def help_text(values: flags.FlagValues, name: str, summary: str) -> str:
    """Returns the help of a program: its flags by group, with their defaults."""
    lines = [f"{name}: {summary}", "", f"usage: {name} [--FLAG=VALUE ...] [--flagfile=FILE]"]
    for title, group in values.flags_by_module_dict().items():
        lines += ["", f"{title}:"]
        for flag in group:
            default = "" if flag.default in (None, [], "") else f" (default: {_shown(flag.default)})"
            head = f"  --{'[no]' if flag.boolean else ''}{flag.name}"
            text = flag.help.partition(";\n    repeat this option")[0]
            lines += textwrap.wrap(
                f"{head}  {text}{default}", _WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False
            )
    return "\n".join(lines)


def given(values: flags.FlagValues) -> list[str]:
    """Returns the flags that were given, on the command line or in a flag file, as they can be typed."""
    return [values[name].serialize() for name in values if values[name].present and name != "flagfile"]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
