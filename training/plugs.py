"""Registries of plug points: names to factories, with errors that name what is valid."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")
Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class PlugConfig:
    """One plug point of a recipe: a name and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[Made]):
    """Names to factories of one plug point; `what` is how messages call it."""

    def __init__(self, what: str, base: Registry[Made] | None = None):
        self.what = what
        self._factories: dict[str, Callable[..., Made]] = {} if base is None else dict(base._factories)

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Add the decorated class or function, whose keyword-only parameters are the options."""

        def add(factory: Factory) -> Factory:
            if name in self._factories:
                raise ValueError(f"{self.what} '{name}' is registered twice")
            self._factories[name] = factory
            return factory

        return add

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted(self._factories)

    def factory(self, name: str) -> Callable[..., Made]:
        """What is registered under a name; ValueError with the valid ones otherwise."""
        if name not in self._factories:
            near = difflib.get_close_matches(name, self._factories, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"no {self.what} '{name}'.{hint} Valid names: {', '.join(self.names())}")
        return self._factories[name]

    def build(self, name: str, options: Mapping[str, Any] | None = None) -> Made:
        """Make it with its options; ValueError naming the valid ones for an unknown or missing option."""
        factory, options = self.factory(name), dict(options or {})
        parameters = inspect.signature(factory).parameters
        for key in options:
            if key not in parameters:
                valid = ", ".join(parameters) or "no options"
                raise ValueError(f"{self.what} '{name}' has no option '{key}'; it takes {valid}")
        for key, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty and key not in options:
                takes = ", ".join(parameters)
                raise ValueError(
                    f"{self.what} '{name}' needs '{key}', which has no default; it takes {takes}"
                )
        try:
            return factory(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.what} '{name}': {error}") from error
