"""What a person sees of a running chain: notebook, cell, time, and the last bar a notebook drew."""

import asyncio
import re
import shutil
import sys
import time

from ..paths import short

EVERY = 60.0  # seconds between two lines where the status cannot be drawn over


def clock(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Lines on stderr as notebooks start and end; between them their state: drawn over each second
    on a terminal, a line a minute elsewhere.
    """

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.running = {}  # name -> [cell, cells, since, last bar]

    def say(self, line: str) -> None:
        """One line, above the status."""
        print(("\r\033[K" if self.terminal else "") + line, file=self.stream, flush=True)

    def start(self, name: str, cells: int, log) -> None:
        """A notebook begins; its bars and warnings go to the file `log`."""
        self.running[name] = [0, cells, time.monotonic(), ""]
        self.say(f"{name}: starts, {cells} cells; bars and warnings in {short(log)}")

    def cell(self, name: str, number: int) -> None:
        """Its code cell `number` begins."""
        self.running[name][0] = number
        self.running[name][3] = ""

    def bar(self, name: str, text: str) -> None:
        """Text that its kernel wrote to stderr; the last bar in it (10%, 3/7) is shown."""
        lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", text)]
        if bars := [line for line in lines if re.search(r"\d%|\d/\d", line)]:
            self.running[name][3] = bars[-1]

    def end(self, name: str, how: str) -> None:
        """It ended; `how`, in a word."""
        if name in self.running:
            cell, cells, since, _ = self.running.pop(name)
            self.say(f"{name}: {how} at cell {cell} of {cells}, {clock(time.monotonic() - since)}")

    def status(self) -> str:
        """All running notebooks in one line."""
        now = time.monotonic()
        return " | ".join(
            f"{name}: cell {cell} of {cells}, {clock(now - since)}" + (f", {bar}" if bar else "")
            for name, (cell, cells, since, bar) in self.running.items()
        )

    async def watch(self) -> None:
        """Show the status until cancelled."""
        while True:
            await asyncio.sleep(1 if self.terminal else EVERY)
            if self.running and self.terminal:
                width = shutil.get_terminal_size().columns - 1
                self.stream.write("\r\033[K" + self.status()[:width])
                self.stream.flush()
            elif self.running:
                self.say(self.status())
