"""What a command of the command line answered."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass
class Result:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)
