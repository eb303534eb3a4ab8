"""What a run says while it works: bars on the screen, and metrics.jsonl."""
import json
import time
from pathlib import Path

from tqdm import tqdm

from minipeso import parallel

EVERY = 10  # training steps between two lines of metrics.jsonl


class Log:
    """log(record) moves the bar of the record's stage; every tenth step, and whatever is no step, is a line. `text`
    (the lines) and `seconds` (in epochs) are saved with the training, for `replay` after an interruption."""
    def __init__(self, path: Path | None, name: str):
        self.path, self.name, self.bar = path, name, None
        self.text, self.seconds = "", 0.0

    def __call__(self, record: dict) -> None:
        if "ce" in record:
            self.show(record)
        elif self.bar and "valid_ce" not in record:  # the stage is over
            self.bar.close()
            self.bar = None
        if "ce" not in record or record["step"] % EVERY == 1:
            self.say(json.dumps({"name": self.name, **record}, allow_nan=False) + "\n")

    def say(self, lines: str) -> None:
        self.text += lines
        if self.path and not parallel.rank():
            with open(self.path, "a") as file:
                file.write(lines)

    def replay(self, text: str, seconds: float) -> None:
        self.say(text.removeprefix(self.text))
        self.seconds = seconds

    def show(self, step: dict) -> None:
        if self.bar is None:
            self.bar = bar(f"{self.name} D{step['stage']}", step["steps"], "step", initial=step["step"] - 1)
            self.began, self.tokens = time.perf_counter(), -step["tokens"]  # the first step has just ended
        self.tokens += step["tokens"]
        rate = self.tokens / (time.perf_counter() - self.began)
        self.bar.update(step["step"] - self.bar.n)
        self.bar.set_postfix_str(f"ce {step['ce']:.3f}, prox {step['prox']:.1e}, prox/ce {step['prox_ce_ratio']:.1e}, "
                                 f"lr {step['lr']:.1e}, {rate:,.0f} tok/s", refresh=False)


def bar(name: str, total: int, unit: str, **how) -> tqdm:
    """A bar that vanishes when its `with` ends; .update(how many are done since the last call)."""
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=parallel.rank() > 0, **how)
