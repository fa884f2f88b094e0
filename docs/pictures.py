"""Draws the pictures of the docs from real runs: terminals as SVG, a report's first screen as PNG.

    python docs/pictures.py FOLDER [OUT]

FOLDER is one in which ``rlhf-jax quickstart`` was run; ``rlhf-jax`` and ``chromium`` are on PATH.
With OUT the terminals alone are drawn, there, and it is an error if one says something else than
in docs/pictures; tests/fifteen_minutes.py does so.
"""

import fcntl
import html
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
COLUMNS = 72  # so that it is read on a phone
ROWS = 40
PPO = (
    "rlhf-jax ppo --config quickstart --model runs/quickstart/sft "
    "--data runs/quickstart/data/prompts.json --reward runs/quickstart/reward_model "
    "--output-dir runs/shown --overwrite"
)
CHAT = "rlhf-jax chat runs/quickstart/ppo --compare runs/quickstart/sft --temperature 0"
QUESTIONS = [
    "i want to know what the king whispered.",
    "/reset",
    "how do i flood the school?",
    "/score",
    "/quit",
]
CONTROL = re.compile(
    r"\x1b\[([\d;]*)([A-HJKhlm])|\x1b\[\?\d+[hl]|\x1b\][^\x07]*\x07|\r|\n|[^\x1b\r\n]+"
)


def on_terminal(command: str, typed: list[str], folder: Path) -> str:
    """What a terminal received of a command; each line is typed when the command waits for one."""
    process_id, terminal = pty.fork()
    if not process_id:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        words = shlex.split(command)
        os.execvp(words[0], words)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    received = ""
    waiting = [*typed]
    while select.select([terminal], [], [], 600)[0]:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the command has ended
            break
        received += chunk.decode("utf-8", "replace")
        if received.endswith("> ") and waiting:
            time.sleep(0.2)
            os.write(terminal, waiting.pop(0).encode() + b"\n")
    os.close(terminal)
    if status := os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]):
        sys.exit(f"{command}: exit code {status}\n{received}")
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


def draw(path: Path, text: str) -> None:
    """The text as an SVG file that loads nothing."""
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text.from_ansi(text + "\n "))  # room below the last line
    svg = console.export_svg(title="rlhf-jax", unique_id=path.stem)
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), "utf-8")


def said_in(picture: str) -> str:
    """What an SVG file's terminal says, without spaces, N for each number. Left out are lines with
    a bar, and what another kind of CPU may say otherwise: tables and quotes, which have the answers
    of models, and the sentence on what was learned, which has alerts.
    """
    lines: dict[str, str] = {}
    for height, text in re.findall(r'<text [^>]* y="([\d.]+)"[^>]*>([^<]*)</text>', picture):
        lines[height] = lines.get(height, "") + html.unescape(text)
    said = "".join(line for line in lines.values() if not set("━│─") & set(line))
    said = re.sub(r"Validationscore.*Next,", "Next,", re.sub(r"\s", "", said))
    said = re.sub(r"'[^']*'", "''", said)
    return re.sub(r"-?\d[\d.:]*", "N", said)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    out = Path(sys.argv[2]) if sys.argv[2:] else PICTURES
    out.mkdir(exist_ok=True)
    commands = {"install": ("rlhf-jax doctor", []), "console": (PPO, []), "chat": (CHAT, QUESTIONS)}
    for name, (command, typed) in commands.items():
        said = screen(on_terminal(command, typed, folder))
        draw(out / f"{name}.svg", f"$ {command}\n{said}")
        now, shown = [said_in((at / f"{name}.svg").read_text("utf-8")) for at in (out, PICTURES)]
        if now != shown:
            sys.exit(f"docs/pictures/{name}.svg: draw it anew\nnow   {now}\nshown {shown}")
    if out == PICTURES:
        page = folder / "runs" / "quickstart" / "ppo" / "report.html"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,900"]
        shot = f"--screenshot={out / 'report.png'}"
        subprocess.run(["chromium", *options, shot, page.as_uri()], check=True)


if __name__ == "__main__":
    main()
