import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Router:
    name: str
    kind: str
    init: Callable[[], Any]
    act: Callable[..., Any]
    sees: str = "predictions"
