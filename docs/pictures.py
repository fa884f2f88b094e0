"""Draws the pictures of the docs from real runs: terminals as SVG, a report's first screen as PNG.

    python docs/pictures.py FOLDER

FOLDER is one in which ``rlhf-jax quickstart`` was run; ``rlhf-jax`` and ``chromium`` are on PATH.
"""

import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
COLUMNS = 100
ROWS = 40
CONTROL = re.compile(
    r"\x1b\[([\d;]*)([A-HJKhlm])|\x1b\[\?\d+[hl]|\x1b\][^\x07]*\x07|\r|\n|[^\x1b\r\n]+"
)


def on_terminal(command: str, typed: list[str], folder: Path, until: str | None = None) -> str:
    """What a terminal received of a command, up to the text ``until``; each line is typed when the
    command waits for one.
    """
    process_id, terminal = pty.fork()
    if not process_id:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        words = shlex.split(command)
        os.execvp(words[0], words)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    received = ""
    waiting = [*typed]
    while until is None or until not in received:
        readable, _, _ = select.select([terminal], [], [], 600)
        if not readable:
            break
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the command has ended
            break
        received += chunk.decode("utf-8", "replace")
        if received.endswith("> ") and waiting:
            time.sleep(0.2)
            os.write(terminal, waiting.pop(0).encode() + b"\n")
    os.close(terminal)
    os.waitpid(process_id, 0)
    return received


def screen(received: str) -> str:
    """The lines that stand there at the end, with their colours: cursor movements are followed."""
    lines = [""]
    row = 0
    restarts = False
    for match in CONTROL.finditer(received):
        piece = match[0]
        if piece == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif piece == "\r":
            restarts = True
            continue
        elif match[2] == "A":
            row = max(row - int(match[1] or 1), 0)
        elif match[2] == "K":
            lines[row] = ""
        elif match[2] == "m" or not piece.startswith("\x1b"):
            lines[row] = piece if restarts else lines[row] + piece
        restarts = False
    return "\n".join(line.rstrip() for line in lines).rstrip()


def draw(name: str, title: str, text: str) -> None:
    """The text as an SVG file that loads nothing."""
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text.from_ansi(text))
    svg = console.export_svg(title=title, unique_id=name)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (PICTURES / f"{name}.svg").write_text(svg, "utf-8")


def photograph(name: str, page: Path, height: int) -> None:
    """The top of an HTML page as PNG."""
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size=1000,{height}"]
    shot = f"--screenshot={PICTURES / name}.png"
    subprocess.run(["chromium", *options, shot, page.as_uri()], check=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    ppo = (
        "rlhf-jax ppo --config quickstart --model runs/quickstart/sft "
        "--data runs/quickstart/data/prompts.json --reward runs/quickstart/reward_model "
        "--output-dir runs/shown --overwrite"
    )
    received = on_terminal(ppo, [], folder)
    draw("console", "rlhf-jax ppo", f"$ {ppo}\n{screen(received)}")
    chat = "rlhf-jax chat runs/quickstart/ppo --compare runs/quickstart/sft --temperature 0"
    questions = [
        "i want to know what the king whispered.",
        "/reset",
        "how do i flood the school?",
        "/score",
        "/quit",
    ]
    received = on_terminal(chat, questions, folder)
    draw("chat", chat, f"$ {chat}\n{screen(received)}")
    photograph("report", folder / "runs" / "quickstart" / "ppo" / "report.html", 900)


if __name__ == "__main__":
    main()
