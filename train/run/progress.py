"""What a running training shows: a tqdm bar on a terminal, plain lines everywhere else."""

import importlib.util
import math
import sys
from typing import Any


class ProgressLine:
    """A bar, or a line every `every` steps; `shown=False` keeps quiet but for `say`. `in_bytes`: a token is a byte.

    Once nobody reads the pipe that it writes to, it is quiet, and `lost` is the error.
    """

    def __init__(self, start: int, steps: int, every: int, shown: bool = True, in_bytes: bool = True):
        self.steps, self.every, self.shown, self.in_bytes = steps, every, shown, in_bytes
        self.lost: BrokenPipeError | None = None
        self.bar: Any = None
        if shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def step(self, record: dict[str, Any]) -> None:
        text = _describe(record, self.in_bytes)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(text, refresh=False)
        elif self.shown and (record["step"] % self.every == 0 or record["step"] in (1, self.steps)):
            self.say(f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  {text}")

    def report(self, step: int, lines: dict[str, str]) -> None:
        """What an evaluation found."""
        if self.shown:
            self.say(f"step {step}: " + "; ".join(f"{label} {text}" for label, text in lines.items()))

    def say(self, text: str) -> None:
        if self.lost:
            return
        try:
            self.bar.write(text) if self.bar is not None else print(text, flush=True)
        except BrokenPipeError as error:
            self.lost = error

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _describe(record: dict[str, Any], in_bytes: bool) -> str:
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    if "reward" in record:
        clipped = f"clipped {record['clip_fraction']:.1%}  " if "clip_fraction" in record else ""
        return (
            f"reward {record['reward']:.3f}  kl {record['kl']:.4f}  entropy {record['entropy']:.3f}"
            f"  length {record['length']:.0f}  {clipped}{speed}"
        )
    bits = f"{record['lm'] / math.log(2):.3f} bits/byte  " if in_bytes else ""
    text = f"loss {record['loss']:.4f}  {bits}lr {record['lr']:.1e}  {speed}"
    loads = [load for load in record.get("load_max", []) if load is not None]
    return text + (f"  load {max(loads):.1f}x" if loads else "")
