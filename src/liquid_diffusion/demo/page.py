"""Pictures as HTML with everything inside it: no file is written, so none has to be served.

A run's class names may come from a stranger's model; whatever is text here is escaped.
"""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from liquid_diffusion.demo.drawing import Frame, PathPoint
from liquid_diffusion.grid import draw_grid

_PIXELATED_UP_TO = 64  # smaller pictures are enlarged pixel by pixel, as in the grids; larger ones smoothly
_LIGHT = 80  # quality of WebP for pictures that are only passing

CSS = """
.ld-head h1 { margin: 0 0 .25rem; font-size: 1.6rem; }
.ld-head p { margin: .1rem 0; color: var(--body-text-color-subdued); max-width: 60rem; }
.ld-status { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; min-height: 2rem;
             color: var(--body-text-color); font-variant-numeric: tabular-nums; }
.ld-status progress { flex: 1 1 8rem; max-width: 24rem; height: .5rem; appearance: none; border: none;
                      border-radius: .25rem; overflow: hidden; background: var(--border-color-primary); }
.ld-status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.ld-status progress::-webkit-progress-value { background: var(--color-accent); }
.ld-status progress::-moz-progress-bar { background: var(--color-accent); }
.ld-status a, .ld-card a { color: var(--link-text-color); text-decoration: none; }
.ld-status a { padding: .25rem .6rem; border: 1px solid var(--border-color-primary); border-radius: .5rem; }
.ld-status a:hover { border-color: var(--color-accent); }
.ld-pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(8rem, 44%), 1fr)); gap: .6rem;
               margin-top: .6rem; }
.ld-pictures.ld-few { grid-template-columns: repeat(auto-fit, minmax(min(12rem, 44%), 20rem)); }
.ld-card { margin: 0; }
.ld-card img, .ld-strip img, .ld-morph img { display: block; width: 100%; border-radius: .35rem;
                                              box-shadow: 0 0 0 1px var(--border-color-primary); }
.ld-card figcaption { padding-top: .15rem; font-size: .8rem; line-height: 1.3; color: var(--body-text-color); }
.ld-card figcaption div { display: flex; justify-content: space-between; color: var(--body-text-color-subdued); }
.ld-card figcaption p { margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.ld-pixels img { image-rendering: pixelated; }
.ld-strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(5.5rem, 1fr);
            grid-template-rows: auto auto auto; gap: .35rem .35rem; overflow-x: auto; padding: .5rem 1px; }
.ld-strip span { font-size: .8rem; color: var(--body-text-color-subdued); text-align: center;
                 font-variant-numeric: tabular-nums; }
.ld-strip .ld-row { text-align: right; align-self: center; padding-right: .3rem; }
.ld-morph { max-width: 20rem; margin: .6rem auto; }
.ld-empty { color: var(--body-text-color-subdued); border: 1px dashed var(--border-color-primary);
            border-radius: .5rem; padding: 3rem 1rem; text-align: center; }
"""


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    if kind == "webp":
        image.save(buffer, "webp", quality=_LIGHT)
    else:
        image.save(buffer, "png")
    return buffer.getvalue()


def _png(image: Image.Image) -> str:
    return _uri("image/png", _encoded(image))


def _download(text: str, name: str, uri: str) -> str:
    return f'<a href="{uri}" download="{escape(name)}">{escape(text)}</a>'


def _look(image: Image.Image) -> str:
    return "ld-pixels" if image.width <= _PIXELATED_UP_TO else ""


def zipped(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A zip archive of (name, content)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG does not get smaller
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def animated(pictures: Sequence[Image.Image], milliseconds: int = 120, least_side: int = 256) -> bytes:
    """A GIF that goes through the pictures and back, for ever; small ones are enlarged pixel by pixel."""
    scale = max(1, -(-least_side // pictures[0].width))
    size = (pictures[0].width * scale, pictures[0].height * scale)
    there = [picture.resize(size, Image.Resampling.NEAREST) for picture in pictures]
    rounds = there + there[-2:0:-1]
    buffer = io.BytesIO()
    rounds[0].save(buffer, "gif", save_all=True, append_images=rounds[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()


def drawn(frame: Frame, classes: Sequence[str], seeds: Sequence[int], words: str = "") -> str:
    """Pictures as they come, and when they are finished with links to download each and all.

    Args:
        frame: the pictures.
        classes: the class of each, empty where there are none.
        seeds: the seed of each.
        words: said when the pictures are finished.
    """
    pictures = frame.pictures
    names = [f"{seed:06d}" for seed in seeds]
    if frame.last:
        contents = [_encoded(picture) for picture in pictures]
        archive = zipped((f"{name}.png", content) for name, content in zip(names, contents, strict=True))
        sheet = draw_grid(pictures, columns=max(1, round(len(pictures) ** 0.5)))
        status = (
            f"<span>{escape(words)}</span>"
            + _download("All pictures (zip)", "pictures.zip", _uri("application/zip", archive))
            + _download("As one grid (png)", "grid.png", _png(sheet))
        )
        sources = [_uri("image/png", content) for content in contents]
        links = [_download("save", f"{name}.png", source) for name, source in zip(names, sources, strict=True)]
    else:
        status = (
            f'<progress value="{frame.index + 1}" max="{frame.total}"></progress>'
            f"<span>step {frame.index + 1} of {frame.total}, t = {frame.t:.2f}</span>"
        )
        kind = "png" if _look(pictures[0]) else "webp"  # noise of 256 px is ten times smaller as WebP
        sources = [_uri(f"image/{kind}", _encoded(picture, kind)) for picture in pictures]
        links = [""] * len(pictures)
    cards = "".join(
        f'<figure class="ld-card"><img src="{source}" alt="{escape(name)} seed {seed}"><figcaption>'
        f'<p title="{escape(name)}">{escape(name)}</p><div><span>seed {seed}</span>{link}</div></figcaption></figure>'
        for source, name, seed, link in zip(sources, classes, seeds, links, strict=True)
    )
    few = "ld-few" if len(pictures) <= 4 else ""
    return f'<div class="ld-status">{status}</div><div class="ld-pictures {few} {_look(pictures[0])}">{cards}</div>'


def path_strip(points: Sequence[PathPoint], words: str) -> str:
    """Two rows over the time, states and predictions, and the same as a PNG to download."""
    times = [f"t = {point.t:.2f}" for point in points]
    columns = "".join(
        f'<span>{time}</span><img src="{_png(point.state)}" alt="the state at {time}">'
        f'<img src="{_png(point.prediction)}" alt="the prediction at {time}">'
        for time, point in zip(times, points, strict=True)
    )
    rows = [point.state for point in points] + [point.prediction for point in points]
    sheet = draw_grid(rows, len(points), row_names=["state", "prediction"], column_names=times)
    return (
        f'<div class="ld-status"><span>{escape(words)}</span>{_download("Save (png)", "path.png", _png(sheet))}</div>'
        f'<div class="ld-strip {_look(rows[0])}">'
        f'<span></span><span class="ld-row">state</span><span class="ld-row">prediction</span>{columns}</div>'
    )


def morph_strip(pictures: Sequence[Image.Image], words: str) -> str:
    """The morph as an animation and as a strip, with both to download."""
    gif = _uri("image/gif", animated(pictures))
    strip = draw_grid(pictures, len(pictures))
    cells = "".join(f'<img src="{_png(picture)}" alt="picture {i}">' for i, picture in enumerate(pictures, start=1))
    return (
        f'<div class="ld-status"><span>{escape(words)}</span>{_download("Save (gif)", "morph.gif", gif)}'
        f"{_download('Save the strip (png)', 'morph.png', _png(strip))}</div>"
        f'<div class="ld-morph {_look(pictures[0])}"><img src="{gif}" alt="the morph, moving"></div>'
        f'<div class="ld-strip {_look(pictures[0])}" style="grid-template-rows: auto">{cells}</div>'
    )


def empty(words: str) -> str:
    """What stands where pictures will be."""
    return f'<div class="ld-empty">{escape(words)}</div>'


def head(title: str, lines: Sequence[str]) -> str:
    """The top of the page."""
    return f'<div class="ld-head"><h1>{escape(title)}</h1>' + "".join(f"<p>{escape(x)}</p>" for x in lines) + "</div>"
