"""The flags of all commands. Nothing here imports torch, so `--help` and wrong flags are answered at once."""

import argparse
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser of flags without abbreviations that suggests the nearest flag for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        if message.startswith("unrecognized arguments: "):
            words = [word.partition("=")[0] for word in message.split()[2:] if word.startswith("-")]
            nearest = [get_close_matches(word, self._flags(), n=1) for word in words]
            if found := [self._flags()[match] for matches in nearest for match in matches]:
                message += f"; did you mean {', '.join(found)}?"
        super().error(message)

    def _flags(self) -> dict[str, str]:
        """The flags of the parser and of its commands, with the first spelling of each."""
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        commands = [parser for group in groups for parser in group.choices.values()]
        actions = [item for parser in (self, *commands) for item in parser._option_string_actions.items()]
        return {flag: action.option_strings[0] for flag, action in actions}


def positive_int(text: str) -> int:
    """Argparse type of an integer of at least 1."""
    return int(_positive(int, text, "an integer of at least 1", 1, math.inf))


def positive_number(text: str) -> float:
    """Argparse type of a positive number within the range of float32."""
    return _positive(float, text, "a number above 0 that is not extreme", 1e-20, 1e20)


def _positive(convert: Callable[[str], float], text: str, expected: str, smallest: float, largest: float) -> float:
    try:
        number = convert(text)
    except ValueError:
        number = 0
    if not smallest <= number <= largest:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number
