"""The web page and its server: widgets only, what they do stands in `drawing` and `page`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

from liquid_diffusion.config import SOLVER, SOLVERS, STEPS, DemoConfig, SampleConfig
from liquid_diffusion.demo import drawing, page
from liquid_diffusion.errors import UserError, is_out_of_memory
from liquid_diffusion.hardware import keep_freed_memory, process_state
from liquid_diffusion.history import grids, loss_curve
from liquid_diffusion.loading import find_run, load_pipeline
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.resolve import without_pattern

_ALL = "all in turn"
_WAITING = 16  # requests in the queue; one more is told that the demo is busy
_FRAMES = 16
_BUSY: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # all buttons share one model
_VIEWS: dict[str, drawing.View] = {"noise turning into pictures": "state", "what the model expects": "prediction"}


def _gradio() -> Any:
    """gradio, told to stay silent: it would else report its use to its makers."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError("The demo needs an extra: pip install 'liquid-diffusion[demo]'.") from error
    return gradio


def _whole_number(value: Any, name: str) -> int:
    """What a widget has; a program that calls the page may send anything."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if value == int(value):
            return int(value)
    raise UserError(f"{name} must be a whole number.")


def _with_messages(gr: Any, work: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """The function with a person's mistakes as gradio's message; other errors stay in the server's log."""

    @functools.wraps(work)  # the client's argument names are those of the function
    def run(*values: Any) -> Iterator[Any]:
        try:
            result = work(*values)
            if isinstance(result, Iterator):
                yield from result
            else:
                yield result
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise gr.Error("The memory is full; ask for fewer pictures.") from error

    return run


class Demo:
    """The page of one model.

    Args:
        pipeline: on the device it is to run on.
        run: what a person called it.
    """

    def __init__(self, pipeline: LiquidDiffusionPipeline, run: str) -> None:
        self.pipeline, self.run = pipeline, run
        self.most = drawing.most_pictures(pipeline)
        self.names: list[str] = pipeline.config["label_names"]
        self.folder = Path(run).expanduser()

    # ---- what the buttons do

    @staticmethod
    def request(
        label: str | None, seed: float | None, steps: float, guidance: float, solver: str, n: float = 1
    ) -> SampleConfig:
        """The widgets' values as a request.

        Raises:
            UserError: a value is none.
        """
        return SampleConfig(
            n=_whole_number(n, "The number of pictures"),
            steps=_whole_number(steps, "Steps"),
            solver=solver,
            label=None if label in (None, _ALL) else label,
            guidance=float(guidance),
            seed=_whole_number(seed, "The seed"),
        )

    def classes(self, config: SampleConfig) -> list[str]:
        """Name of each picture's class, empty where there are none."""
        numbers = self.pipeline.labels(config.label, config.n)
        return [""] * config.n if numbers is None else [self.names[k] for k in numbers.tolist()]

    def _start(self, config: SampleConfig) -> str:
        """Class and seed of the first picture."""
        return f"{self.classes(config)[0]}, seed {config.seed}".removeprefix(", ")

    def draw(
        self,
        label: str | None,
        seed: float | None,
        steps: float,
        guidance: float,
        solver: str,
        n: float,
        view: str,
    ) -> Iterator[str]:
        """Pictures, step by step, as HTML."""
        config = self.request(label, seed, steps, guidance, solver, n)
        drawing.check(self.pipeline, config)
        seeds = range(config.seed, config.seed + config.n)
        classes, began = self.classes(config), time.perf_counter()
        for frame in drawing.draw(self.pipeline, config, _VIEWS[view]):
            words = f"{config.n} in {config.steps} steps of {solver}, {time.perf_counter() - began:.1f} s"
            yield page.drawn(frame, classes, seeds, words)

    def path(self, label: str | None, seed: float | None, steps: float, guidance: float, solver: str) -> str:
        """One picture's path, as HTML."""
        config = self.request(label, seed, steps, guidance, solver)
        points = drawing.path(self.pipeline, config)
        return page.path_strip(points, f"{self._start(config)}, {config.steps} steps of {solver}")

    def morph(
        self,
        label: str | None,
        seed: float | None,
        steps: float,
        guidance: float,
        solver: str,
        other_seed: float | None,
        frames: float,
    ) -> str:
        """The way between two seeds, as HTML."""
        config = self.request(label, seed, steps, guidance, solver)
        other = _whole_number(other_seed, "The other seed")
        pictures = drawing.morph(self.pipeline, config, other, _whole_number(frames, "The number of pictures"))
        return page.morph_strip(pictures, f"{self._start(config)} to seed {other}")

    def history(self) -> tuple[list[tuple[Image.Image, str]], Any]:
        """The run's grids with their captions, and its loss as a table."""
        import pandas

        pictures = []
        for step, file in grids(self.folder):
            with contextlib.suppress(OSError), Image.open(file) as image:  # one may be half written
                pictures.append((image.convert("RGB"), f"step {step}"))
        return pictures, pandas.DataFrame(loss_curve(self.folder), columns=["step", "loss"])

    # ---- the page

    def head(self) -> str:
        """Title and explanation, as HTML."""
        millions = sum(parameter.numel() for parameter in self.pipeline.unet.parameters()) / 1e6
        height, width = self.pipeline.usual_shape
        facts = [f"{millions:.1f} M parameters", f"{width} px" if height == width else f"{width} x {height} px"]
        if self.names:
            facts.append(f"{len(self.names)} classes")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            settings = yaml.safe_load((self.folder / "config.yaml").read_text())
            facts.append(f"trained on {without_pattern(settings['data']).name}")
        if curve := loss_curve(self.folder):
            facts.append(f"{curve[-1][0]:,.0f} steps")
        return page.head(
            f"LiquidDiffusion: {self.folder.resolve().name}",
            [
                "A small image generator without attention: it starts from noise at t = 1 and follows the velocity "
                "that it predicts to a picture at t = 0. A seed always gives the same picture.",
                " · ".join(facts),
            ],
        )

    def build(self) -> Any:
        """The page as gradio's Blocks."""
        gr = _gradio()
        with gr.Blocks(title=f"LiquidDiffusion: {self.folder.resolve().name}", analytics_enabled=False) as blocks:
            gr.HTML(self.head())
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    wish = self._settings(gr)
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    with gr.Tab("Draw"):
                        self._draw_tab(gr, wish)
                    with gr.Tab("Path"):
                        self._path_tab(gr, wish)
                    with gr.Tab("Morph", visible=self.most > 1):
                        self._morph_tab(gr, wish)
                    with gr.Tab("Training"):
                        self._training_tab(gr, blocks)
        return blocks.queue(max_size=_WAITING)

    def _settings(self, gr: Any) -> list[Any]:
        """Class, seed, steps, guidance and solver, which count in every tab."""
        classes = bool(self.names)
        label = gr.Dropdown([_ALL, *self.names], value=_ALL, label="Class", visible=classes)
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        another = gr.Button("Another seed", size="sm")
        another.click(lambda: random.randrange(2**16), None, seed, api_visibility="private", queue=False)
        guidance = gr.Slider(
            0, 8, self.pipeline.config["guidance"] if classes else 1.0, step=0.1, label="Guidance", visible=classes,
            info="1 is none; more is clearer and less varied",
        )  # fmt: skip
        steps = gr.Slider(1, drawing.MOST_STEPS, STEPS, step=1, label="Steps")
        solver = gr.Dropdown(list(SOLVERS), value=SOLVER, label="Solver")
        return [label, seed, steps, guidance, solver]

    def _draw_tab(self, gr: Any, wish: list[Any]) -> None:
        few = min(16 if self.pipeline.vae is None else 4, self.most)
        with gr.Row():
            n = gr.Slider(1, self.most, few, step=1, label="Pictures", min_width=240, visible=self.most > 1)
            view = gr.Radio(list(_VIEWS), value=next(iter(_VIEWS)), label="While it draws, show", min_width=240)
        with gr.Row():
            go = gr.Button("Draw", variant="primary", elem_id="draw")
            stop = gr.Button("Stop", scale=0, min_width=120)
        pictures = gr.HTML(page.empty("Press Draw, and watch the steps arrive."), elem_id="pictures")
        drawn = go.click(
            _with_messages(gr, self.draw), [*wish, n, view], pictures, api_name="draw", show_progress="hidden", **_BUSY
        )
        stop.click(None, cancels=[drawn], api_visibility="private")

    def _path_tab(self, gr: Any, wish: list[Any]) -> None:
        gr.Markdown(
            "One picture on its way: above what the model sees at time t, below the finished picture that it predicts "
            "from it."
        )
        go = gr.Button("Show the path", variant="primary", elem_id="path")
        strip = gr.HTML(page.empty("Noise on the left, the picture on the right."), elem_id="strip")
        go.click(_with_messages(gr, self.path), wish, strip, api_name="path", **_BUSY)

    def _morph_tab(self, gr: Any, wish: list[Any]) -> None:
        gr.Markdown("From the noise of one seed to the noise of another, along the sphere between; one class for all.")
        most = max(2, min(_FRAMES, self.most))
        with gr.Row():
            other = gr.Number(1, label="Other seed", precision=0, min_width=240)
            frames = gr.Slider(2, most, max(2, most // 2), step=1, label="Pictures", min_width=240)
        go = gr.Button("Morph", variant="primary", elem_id="morph")
        moving = gr.HTML(page.empty("The way between the two seeds, moving."), elem_id="moving")
        go.click(_with_messages(gr, self.morph), [*wish, other, frames], moving, api_name="morph", **_BUSY)

    def _training_tab(self, gr: Any, blocks: Any) -> None:
        if not (grids(self.folder) or loss_curve(self.folder)):
            gr.HTML(page.empty("Grids and loss are shown for a run folder; this is a model alone."))
            return
        again = gr.Button("Look again", size="sm")
        curve = gr.LinePlot(x="step", y="loss", title="Loss", height=240, show_label=False, elem_id="loss")
        gallery = gr.Gallery(
            format="png", preview=True, object_fit="contain", label="Samples, always of the same seeds", height=560,
            buttons=["download", "fullscreen"], elem_id="grids",
        )  # fmt: skip
        gr.on(
            [blocks.load, again.click], self.history, None, [gallery, curve], api_visibility="private",
            show_progress="hidden",
        )  # fmt: skip

    def launch(self, host: str, port: int) -> Any:
        """Start the server in threads of its own, which end with the process."""
        gr, blocks = _gradio(), self.build()
        blocks.launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, inbrowser=False,
            max_file_size=1,  # nothing is to be uploaded
            run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False,
            footer_links=[], show_error=False, css=page.CSS,
            theme=gr.themes.Default(
                primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ),
        )  # fmt: skip
        return blocks


@contextlib.contextmanager
def private_files() -> Iterator[Path]:
    """A folder for what gradio writes, readable by its owner only and gone afterwards.

    gradio serves all that lies in the folder it writes to, which else is one for all of its programs on the machine.
    """
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="liquid-diffusion-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _check_address(host: str, port: int) -> None:
    """See that the address is free, before a model is loaded for nothing."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # which goes on with the address
        raise UserError(f"{host}:{port} can't be used ({reason}); choose another --port or --host.") from error


def _leave_at_once() -> NoReturn:
    """End the process before Python takes itself apart.

    A thread of the server that is drawing then would come back from torch to an interpreter that is gone, which
    aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def serve(run: str | None, config: DemoConfig) -> NoReturn:
    """What `liquid-diffusion demo` does: the page of a run on this machine, until Ctrl-C or SIGTERM.

    Raises:
        UserError: the run can't be loaded, the address can't be used, or the extra `demo` is not installed.
    """
    _check_address(config.host, config.port)
    _gradio()
    disable_progress_bar()  # of the parts being loaded
    keep_freed_memory()
    pipeline = load_pipeline(run).to(process_state().device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or a service that is stopped leaves its files
    try:
        with private_files():
            blocks = Demo(pipeline, find_run(run)).launch(config.host, config.port)
            print(f"{blocks.local_url} shows {run or 'the packaged model'}; Ctrl-C ends it.", flush=True)
            while True:
                time.sleep(3600)  # the server's threads end with the process; to close them takes 10 s
    except KeyboardInterrupt:
        atexit.register(_leave_at_once)
        raise
