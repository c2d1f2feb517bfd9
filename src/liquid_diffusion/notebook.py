"""Training in a notebook: loss and newest grid under the cell, drawn anew while it runs."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from liquid_diffusion.config import TrainConfig
from liquid_diffusion.errors import UserError
from liquid_diffusion.history import grids, loss_curve
from liquid_diffusion.training.trainer import Trainer


def overview(run: Path) -> bytes | None:
    """The loss of a run over its steps beside its newest grid, as a PNG; None while there is no line of metrics.

    Raises:
        UserError: the extra `notebook` is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.image import imread
    except ImportError as error:
        raise UserError("The display needs an extra: pip install 'liquid-diffusion[notebook]'.") from error
    curve = loss_curve(run)
    if not curve:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*curve, strict=True), color="#0d9488")
    left.set(xlabel="step", ylabel="loss", yscale="log", title=f"step {curve[-1][0]:.0f}, loss {curve[-1][1]:.3f}")
    left.grid(alpha=0.3, which="both")
    right.axis("off")
    if newest := grids(run)[:1]:
        step, file = newest[0]
        right.imshow(imread(file), interpolation="nearest")
        right.set_title(f"samples at step {step}")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    return content.getvalue()


class Watch:
    """While it is open, the overview of a run stands under the notebook's cell and is drawn anew.

    Args:
        run: the run folder, which need not exist yet.
        seconds: between two looks at it.
    """

    def __init__(self, run: Path, seconds: float = 15.0) -> None:
        from IPython.display import DisplayHandle

        overview(run)  # what is missing for it is told before the training and not after it
        self.run, self.seconds = run, seconds
        self._handle: Any = DisplayHandle()
        self._shown = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.show()

    def show(self) -> None:
        """Draw it as it is now."""
        from IPython.display import Image

        picture = overview(self.run)
        if picture is None:
            return
        (self._handle.update if self._shown else self._handle.display)(Image(data=picture))
        self._shown = True

    def _keep_looking(self) -> None:
        while not self._over.wait(self.seconds):
            try:
                self.show()
            except (OSError, SyntaxError):
                continue  # a grid that is being written; matplotlib calls a PNG cut short a SyntaxError


def train(config: TrainConfig) -> Path:
    """Train a run, or resume it, and show how it does; stopping the cell saves it.

    Returns:
        The run folder.

    Raises:
        UserError: see `Trainer`.
    """
    trainer = Trainer(config)
    print(trainer.summary())
    if warning := trainer.memory_warning():
        print(warning)
    with Watch(trainer.folder.path):
        done = trainer.run()
    print("Done." if done else f"Stopped at step {trainer.step}; all is saved. Run the cell again to go on.")
    return trainer.folder.path
