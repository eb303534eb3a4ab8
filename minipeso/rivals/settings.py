"""How a rival takes its own settings from the flags of a run; each stands beside the code that it changes."""
from dataclasses import dataclass, fields
from typing import ClassVar

from minipeso.config import Config, check


@dataclass(frozen=True)
class Flags:
    """A subclass's fields are flags of train.py, with their defaults; the comment behind each is its help."""
    bounds: ClassVar[dict[str, tuple[float, float]]] = {}  # field -> from, to; the others as config.BOUNDS has it

    @classmethod
    def of(cls, cfg: Config):
        """The run's flags that are fields here, defaults for the rest; UsageError for one out of its bounds."""
        own = {field.name: cfg.rivals[field.name] for field in fields(cls) if field.name in cfg.rivals}
        return check(cls(**own), cls.bounds)
