import dataclasses
from typing import Any,Callable
@dataclasses.dataclass(frozen=True)
class Router:
    name: str
    kind: str
    init: Callable[[], Any]
    act: Callable[..., Any]
    sees: str = "predictions"
