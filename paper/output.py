"""What paper/ writes: Markdown tables, texts, JSON, and figures, left as they are if they look alike."""

import io
import json
import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from lib.files import replacing

DPI = 110
PALETTE = 128  # colours of a figure, which is a third of the bytes of all
UNSEEN = 24  # of 255: how far a pixel may be from what it was, as where a fit ends a digit elsewhere


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rows])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: dict | list) -> None:
    """A list has each of its entries on a line of its own."""
    lines = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else ""
    write(path, f"[\n{lines}\n]\n" if lines else json.dumps(value, indent=1) + "\n")


def read_json(path: Path):
    """None where there is no file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def save(fig, path: Path, message: str, setting: str) -> None:
    """Write a figure as PNG, with the message as its title and one legend for all axes."""
    width = fig.get_figwidth()
    if curves := {label: curve for ax in fig.axes for curve, label in zip(*ax.get_legend_handles_labels())}:
        curves = dict(sorted(curves.items(), key=lambda item: item[0].startswith("final")))
        columns = columns_for(list(curves), width)
        fig.set_figheight(fig.get_figheight() + 0.19 * (math.ceil(len(curves) / columns) - 1))
        fig.legend(curves.values(), curves, loc="outside lower center", ncols=columns, frameon=False,
                   fontsize=9)
    fig.suptitle(textwrap.fill(message, int(10.5 * width)), fontsize=11.5, x=0.01, ha="left")
    setting = textwrap.fill(setting, int(13 * width))
    fig.axes[0].set_title("\n" * setting.count("\n") + " ", fontsize=8)  # room; a wide title parts axes
    fig.axes[0].annotate(setting, (0.01, 1), (0, 7), ("figure fraction", "axes fraction"),
                         textcoords="offset points", fontsize=8, color="0.35").set_in_layout(False)
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=DPI)
    picture = Image.open(drawn).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    if not looks_like(picture, path, message):
        path.parent.mkdir(parents=True, exist_ok=True)
        words = PngInfo()
        words.add_text("Title", message)
        with replacing(path) as file:
            picture.save(file, "PNG", optimize=True, pnginfo=words)


def columns_for(labels: list[str], inches: float) -> int:
    """As many columns of a legend as fit: 0.077 inches a character, and the curve before it."""
    def width(columns):
        parts = [part for part in np.array_split(labels, columns) if len(part)]
        return sum(0.65 + 0.077 * max(map(len, part)) for part in parts)
    return next((columns for columns in (5, 4, 3, 2) if width(columns) < inches), 1)


def looks_like(picture: Image.Image, path: Path, message: str) -> bool:
    """Whether a file shows the same to every eye: another machine's rounding does not change it then."""
    try:
        with Image.open(path) as file:
            there, here, title = file.convert("RGB"), picture.convert("RGB"), file.info.get("Title")
    except OSError:  # none, or no picture
        return False
    return title == message and there.size == here.size and all(
        high <= UNSEEN for _, high in ImageChops.difference(there, here).getextrema())
