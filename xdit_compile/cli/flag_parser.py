"""Reading command lines: as argparse does, with the word that was probably meant where one is unknown."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from xdit_compile.errors import did_you_mean


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors about unknown flags, commands and choices name those that are alike, and whose
    flags may be written with underscores for dashes."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args or ())
        for flag, action in [*self._option_string_actions.items()]:
            if flag.startswith("--"):
                self._option_string_actions.setdefault(f"--{flag[2:].replace('-', '_')}", action)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        made, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._chosen(made).error(f"unrecognized arguments: {' '.join(unknown)}")
        return made

    def error(self, message: str) -> NoReturn:
        known = [flag for flag, action in self._option_string_actions.items()
                 if action.help != argparse.SUPPRESS and flag in action.option_strings]
        unknown = [word.partition("=")[0] for word in self._given if word.startswith("--") and len(word) > 2]
        hints = [did_you_mean(flag, known) for flag in unknown if flag not in self._option_string_actions]
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hints.append(did_you_mean(found[1], re.findall(r"[\w.-]+", found[2])))
        super().error(message + "".join(dict.fromkeys(hints)).replace("'", ""))

    def _chosen(self, made: argparse.Namespace) -> argparse.ArgumentParser:
        """The parser of the command that was chosen, or this one if it has none."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices[getattr(made, action.dest)]
        return self
