"""Pictures of a run: its curves, and where each word of a caption looks."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from itm_pipeline.runs import open_run
from itm_pipeline.runs.files import replace_file
from itm_pipeline.train.log import read_log

Floats = npt.NDArray[np.floating]

LOSS, RSUM, I2T, T2I = "#444444", "#c1440e", "#1b6ca8", "#2f8f4e"
PANEL_INCHES = 2.3
COLUMNS = 5


def curves(run: Path) -> Path:
    """Draw loss and dev recalls over the steps of a run.

    Parameters
    ----------
    run
        Run folder with a log.

    Returns
    -------
    Path
        `curves.png` in the run.
    """
    records = read_log(run)
    steps = [line for line in records if line["kind"] == "train"]
    evaluations = [line for line in records if line["kind"] == "eval"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)

    left.plot([line["step"] for line in steps], [line["loss_per_caption"] for line in steps], color=LOSS, linewidth=1)
    # The hardest-negative loss of a model that gives every pair the same score: above it nothing is learnt yet.
    margin = open_run(run).config.margin
    left.axhline(2 * margin, color=LOSS, linewidth=0.8, linestyle=":", label="2 x margin")
    left.legend(loc="upper right", frameon=False)
    left.set(xlabel="step", ylabel="hinge loss per caption", title="training loss", yscale="log")

    at = [line["epoch"] for line in evaluations]
    for key, name, colour in (("i2t_r1", "image to text R@1", I2T), ("t2i_r1", "text to image R@1", T2I)):
        right.plot(at, [line[key] for line in evaluations], color=colour, marker="o", markersize=3, label=name)
    right.plot(
        at,
        [line["rsum"] / 6 for line in evaluations],
        color=RSUM,
        marker="o",
        markersize=3,
        label="mean of six recalls",
    )
    right.set(xlabel="epoch", ylabel="percent", title="validation", ylim=(0, 100))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, run / "curves.png")


def heat_map(
    boxes: Floats,  # [R, 4], x1 y1 x2 y2 in pixels
    weights: Floats,  # [R]
    size: tuple[int, int],  # height, width
) -> Floats:  # [height, width], largest value 1
    """Attention over pixels: at each pixel, the weights of the boxes that cover it, added up."""
    heat: Floats = np.zeros(size, dtype=np.float64)
    for (x1, y1, x2, y2), weight in zip(boxes, weights, strict=True):
        heat[_pixels(y1, y2, size[0]), _pixels(x1, x2, size[1])] += weight
    heat /= max(heat.max(), 1e-12)
    return heat


def _pixels(first: float, last: float, limit: int) -> slice:
    """Pixels that a side of a box covers, at least one."""
    start = min(max(int(np.floor(first)), 0), limit - 1)
    return slice(start, max(min(int(np.ceil(last)), limit), start + 1))


def attention_picture(
    path: Path,
    picture: Path,
    caption: str,
    words: list[str],
    boxes: Floats,  # [R, 4]
    weights: Floats,  # [W, R], rows sum to 1
) -> Path:
    """Draw a scene, and once more for every word with the heat map of its attention and its strongest region.

    Parameters
    ----------
    path
        The picture to write, PNG.
    picture
        The scene.
    caption
        Stands above.
    words
        Names of the panels, W of them.
    boxes, weights
        Regions in pixels of the scene, and every word's attention to them.

    Returns
    -------
    Path
        `path`.
    """
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    size = (pixels.shape[0], pixels.shape[1])
    grey = pixels.mean(-1)
    rows = -(-(len(words) + 1) // COLUMNS)
    aspect = size[0] / size[1]
    figure = Figure(figsize=(COLUMNS * PANEL_INCHES, rows * (PANEL_INCHES * aspect + 0.35) + 0.5), layout="constrained")
    figure.suptitle(caption, fontsize=13)
    panels: list[Axes] = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()

    panels[0].imshow(pixels)
    panels[0].set_title("scene and regions", fontsize=10)
    for box in boxes:
        panels[0].add_patch(_frame(box, colour="white", width=0.6, alpha=0.8))
    for axes, word, row in zip(panels[1:], words, weights, strict=False):
        heat = heat_map(boxes, row, size)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
        # Transparent where nothing is attended to, so that the scene stays visible there.
        axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.6 * heat)
        axes.add_patch(_frame(boxes[int(row.argmax())], colour="#35e0ff", width=1.6, alpha=1.0))
        axes.set_title(f"{word}  {row.max():.2f}", fontsize=11)
    return _save(figure, path)


def _frame(box: Floats, *, colour: str, width: float, alpha: float) -> Rectangle:
    x1, y1, x2, y2 = (float(value) for value in box)
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width, alpha=alpha)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)  # draws without a display, whatever backend the user's settings name
    with mpl.rc_context({"savefig.dpi": 130}):
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
