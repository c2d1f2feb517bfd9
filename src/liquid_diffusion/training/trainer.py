"""The training of a run: what it is made of, one step, and the loop."""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from liquid_diffusion.codecs import AutoencoderCodec, make_codec
from liquid_diffusion.config import GUIDANCE, TrainConfig
from liquid_diffusion.data.feed import Feed, describe, open_batches, open_latents, open_pictures
from liquid_diffusion.data.ranged import SourceLostError
from liquid_diffusion.data.sources import BadPicture
from liquid_diffusion.data.stream import PictureStream
from liquid_diffusion.errors import UserError
from liquid_diffusion.estimate import shortage_of_run
from liquid_diffusion.grid import draw_grid
from liquid_diffusion.hardware import choose_precision, free_memory, keep_freed_memory, process_state
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline, draw_in_batches
from liquid_diffusion.publish import prepare, publish
from liquid_diffusion.resolve import FACTORS, check_size, resolve
from liquid_diffusion.sampling import make_scheduler
from liquid_diffusion.training.checkpoint import CheckpointFolder
from liquid_diffusion.training.compilation import compile_blocks
from liquid_diffusion.training.learning_rate import learning_rate_factor
from liquid_diffusion.training.resume import check_same_data, check_same_run, data_facts, machine_facts
from liquid_diffusion.training.run_folder import RunFolder
from liquid_diffusion.training.state import TrainingState
from liquid_diffusion.training.step import TrainingStep
from liquid_diffusion.training.tracking import MetricsLog, StopRequest
from liquid_diffusion.writing import writing_to

_GRID_COLUMNS = 8
_FIT_PICTURES = 256
_FIT_PICTURES_CPU_VAE = 16  # the SD-VAE takes 4 s a picture of 256 px on a CPU core


@dataclass(frozen=True)
class StepResult:
    """One optimiser step: its number, from 1, and its loss, a tensor () on the device."""

    step: int
    loss: Tensor


class Trainer:
    """A run, new or resumed.

    Making one does all that can fail because of what a person said; it writes nothing into a run folder that is not
    its own. Of a run that has no step to go nothing is opened: it has no data set, codec, model or state, and can only
    be pushed.

    Args:
        config: the run; what is None in it is decided by `resolve.resolve`.

    Raises:
        UserError: the data, the codec or the size can't be had, or the run folder belongs to another run.
    """

    def __init__(self, config: TrainConfig) -> None:
        device = process_state().device
        AcceleratorState._reset_state()  # else a second run in one process must have the first one's precision
        self.accelerator = Accelerator(mixed_precision=choose_precision(config.precision, device))
        self.config = run = resolve(config, device.type)
        self.folder = RunFolder(Path(run.out).expanduser())
        self.checkpoints = CheckpointFolder(self.folder.path / "checkpoints")
        self.folder.check(Path(run.data).expanduser())
        if self.accelerator.is_main_process:
            self.folder.claim()
        found = self.checkpoints.latest()
        if found is not None:
            check_same_run(self.folder.path, found[2], run, self.accelerator)
        self.step = 0 if found is None else found[1]
        self._opened = not self.finished
        if self.finished:  # its data may be gone
            return
        if device.type == "cpu":
            keep_freed_memory()

        if run.codec in FACTORS:  # before an autoencoder is loaded, which may have to be downloaded
            check_size(run.image_size, run.codec, FACTORS[run.codec])
        self.codec = make_codec(run.codec)
        multiple = check_size(run.image_size, run.codec, self.codec.factor)
        self.dataset: Feed
        self.held_out: int | None
        if run.cache_latents:
            self.dataset, self.held_out = open_latents(run, self.codec, self._begin)
        else:
            self.dataset, self.held_out = open_pictures(run, multiple)
        set_seed(run.seed, device_specific=True)  # now: opening the data may have drawn, or not
        self.model = LiquidUNet.from_preset(run.model, self.codec.channels, len(self.dataset.label_names))
        self.model.to(memory_format=torch.channels_last)
        if run.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        stream = self.dataset if isinstance(self.dataset, PictureStream) else None
        self.state = TrainingState(self.accelerator, self.model, run, stream)
        if isinstance(self.codec, AutoencoderCodec) and not run.cache_latents:  # else it is there for grids only
            self.codec.vae.to(device)

        self.training_step = TrainingStep(self.accelerator, self.state, run, self.dataset, self.codec)

        if found is not None:
            self._load(found[0], found[2])
        if self.accelerator.is_main_process:
            self._begin()
            self.folder.note_skipped(self.dataset.skipped, self.dataset.total)
        self.accelerator.wait_for_everyone()
        if found is None:
            slow = isinstance(self.codec, AutoencoderCodec) and device.type == "cpu"
            count = _FIT_PICTURES_CPU_VAE if slow else _FIT_PICTURES
            self.dataset.fit_codec(self.codec, count, min(16, run.batch_size))

    def _begin(self) -> None:
        """See that the Hub will take the run, and write its configuration; before anything that takes hours."""
        if self.config.push_to_hub:
            prepare(self.config.push_to_hub, self.config.hub_private)
        self.folder.begin(self.config)

    # ---- what run this is

    @property
    def finished(self) -> bool:
        """Whether the run has no step to go."""
        return self.step >= self.config.steps

    def summary(self) -> str:
        """What is about to be trained, in one line."""
        if not self._opened:
            return f"{self.folder.path} has reached its {self.step:,} steps; give more steps to train on."
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        start = f", resumed from step {self.step}" if self.step else ""
        precision = "fp32" if self.accelerator.mixed_precision == "no" else self.accelerator.mixed_precision
        data = describe(self.dataset, self.config, self.held_out)
        batch = self.config.batch_size * self.accelerator.num_processes
        epochs = self.config.steps * batch / len(self.dataset)
        return (
            f"{self.config.model} ({millions:.1f} M parameters) on {data}, codec {self.config.codec}, "
            f"{self.config.steps:,} steps of {batch} ({epochs:.1f} epochs), "
            f"{self.accelerator.device.type} in {precision}, to {self.folder.path}{start}"
        )

    def memory_warning(self) -> str | None:
        """Whether the training won't fit the card, in words, before it is tried; None where it does or nobody knows."""
        free = free_memory(self.accelerator.device)
        if free is None or not self._opened:
            return None
        return shortage_of_run(self.config, len(self.dataset.label_names), self.accelerator.mixed_precision, free)

    # ---- state

    def save(self) -> Path:
        """Write a checkpoint, and the averaged weights as a pipeline.

        Raises:
            UserError: they are no numbers, or can't be written; checkpoint and pipeline of before are as they were.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._no_numbers("The weights are no numbers")
        try:
            with writing_to(self.folder.path):
                return self._save()
        except UserError:
            if self.accelerator.is_main_process:
                self.checkpoints.abandon()  # a disk that is full needs its place
            raise

    def _save(self) -> Path:
        accelerator, folder = self.accelerator, self.checkpoints.place(self.step)
        if accelerator.is_main_process:
            self.checkpoints.begin(self.step)
        accelerator.wait_for_everyone()
        self.state.save(folder)
        if accelerator.is_main_process:
            with self.state.averaged():
                self.folder.save_pipeline(self.pipeline())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            facts = {
                "config": asdict(self.config),
                "codec": self.codec.state(),
                **data_facts(self.dataset),
                "machine": machine_facts(self.accelerator),
            }
            self.checkpoints.finish(self.step, facts)
        accelerator.wait_for_everyone()
        return self.checkpoints.all()[-1]

    def _load(self, folder: Path, facts: dict[str, Any]) -> None:
        check_same_data(folder, facts, self.config.data, self.dataset)
        self.state.load(folder)
        self.codec.set_statistics(facts["codec"]["mean"], facts["codec"]["std"])

    def pipeline(self) -> LiquidDiffusionPipeline:
        """A pipeline of the model as it is now, sharing its weights."""
        height, width = self.dataset.usual_shape
        pipeline = LiquidDiffusionPipeline(
            unet=self.model,
            scheduler=make_scheduler(),
            vae=self.codec.vae if isinstance(self.codec, AutoencoderCodec) else None,
            codec=self.codec.state(),
            label_names=self.dataset.label_names,
            image_size=height if height == width else [height, width],
            guidance=GUIDANCE if self.config.label_dropout else 1.0,  # a null label never seen guides nowhere
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # ---- training

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, list[BadPicture]]]:
        return open_batches(self.dataset, self.config.batch_size, self.step, self.config.workers)

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on a batch; the loss () stays on the device."""
        return self.training_step(images, labels, self.learning_rate)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        run = self.config
        return run.lr * learning_rate_factor(self.step, run.steps, run.warmup_steps, run.cooldown)

    def _compile(self) -> None:
        """Compile the blocks for the batches to come, by a step on zeros of which nothing is kept, and say so."""
        run, device = self.config, self.accelerator.device
        height, width = (side // self.codec.factor for side in self.dataset.usual_shape)
        count = run.batch_size // run.gradient_accumulation

        def step_on_zeros() -> None:
            x = torch.zeros(count, self.codec.channels, height, width, device=device)
            t, labels = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.long, device=device)
            # by the model itself: a try that fails in one process must not leave the others waiting for its gradients
            self.accelerator.backward(self.model(x, t, labels if self.dataset.label_names else None).sample.sum())

        main = self.accelerator.is_main_process
        if main:
            tqdm.write("Compiling the blocks: half a minute or more, seconds the next time; --compile false leaves it.")
        reason = compile_blocks(self.model, step_on_zeros, one_shape=not run.buckets)
        if reason and main:
            tqdm.write(f"The blocks can't be compiled here, so the training goes on without ({reason}).")
        self.state.optimizer.zero_grad(set_to_none=True)

    def steps(self) -> Iterator[StepResult]:
        """Train from where the run is to its last step, one at a time; nothing is written but skipped.jsonl."""
        if self.finished:
            return
        if self.config.compile:
            self._compile()
        self._since = time.perf_counter()  # compiling is not part of a step
        batches = self._batches()
        while not self.finished:  # a stream is not read further than it is trained on
            images, labels, skipped = next(batches)
            self.folder.note_skipped(skipped, self.dataset.total)
            loss = self.train_step(images, labels)
            self.step += 1
            yield StepResult(self.step, loss)

    def run(self) -> bool:
        """Train to the end, with grids, checkpoints, metrics and a progress bar.

        Returns:
            Whether the last step was reached; else somebody asked to stop, and the state is saved.

        Raises:
            UserError: the loss is no number any more, or the pictures can't be had any more; then the state is saved.
        """
        try:
            if not self.finished:
                self._run()
        finally:
            self.folder.release()
        if self.finished:
            self.push()
        return self.finished

    def _run(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        log = MetricsLog(self.folder.path, self.step) if main else None
        bar = tqdm(
            total=config.steps, initial=self.step, desc="Training", unit="step", disable=not main, smoothing=0.05
        )
        losses: list[Tensor] = []
        first = self.step + 1
        stopping = False
        with (
            self._saved_if_the_source_is_lost(losses),
            StopRequest() as stop,
            contextlib.closing(log) if log else contextlib.nullcontext(),
            bar,
        ):
            for result in self.steps():
                losses.append(result.loss)
                if self.step == first:
                    bar.unpause()  # the time left is not told from a first step in which all is compiled
                bar.update()
                saving = self.step % config.checkpoint_every == 0 or self.finished
                drawing = self.step % config.sample_every == 0 or self.finished
                due = self.step % config.log_every == 0 or saving or drawing  # the clock stops for either
                # processes have to agree, which costs a round trip: several ask only where the loss is read anyway
                if due or self.accelerator.num_processes == 1:
                    stopping = self._anyone(stop.wanted)
                if due or stopping:  # the loss is looked at before anything is saved
                    values = self._metrics(losses)
                    losses.clear()
                    bar.set_postfix(loss=f"{values['loss']:.3f}", images_s=f"{values['images_per_second']:.0f}")
                    if log:
                        log.write(self.step, **values)
                if saving or stopping:
                    bar.set_description("Saving")
                    self.save()
                if main and drawing:
                    bar.set_description("Drawing samples")
                    self.draw_samples()  # after saving: a grid that the memory is too small for costs no steps
                bar.set_description("Training", refresh=False)
                if stopping:
                    break
                if not losses:
                    self._since = time.perf_counter()

    def push(self) -> None:
        """Push the run, as far as it is saved, to the Hub repository that it was told of, if any.

        Raises:
            UserError: the Hub does not take it.
        """
        repo = self.config.push_to_hub
        if repo is None or not self.accelerator.is_main_process:
            return
        try:
            print(publish(str(self.folder.path), repo, self.config.hub_private))
        except UserError as error:
            raise UserError(
                f"{self.folder.path} is trained and saved, but not on the Hub. {error} Then: "
                f"liquid-diffusion export {shlex.quote(str(self.folder.path))} --to hub --out {repo}"
            ) from error

    @contextlib.contextmanager
    def _saved_if_the_source_is_lost(self, losses: list[Tensor]) -> Iterator[None]:
        """The state is saved if the pictures can't be had any more within it.

        One of several processes can't save alone, and the others wait for it: they resume from the last checkpoint.
        """
        try:
            yield
        except SourceLostError as error:
            if self.accelerator.num_processes > 1:
                raise
            if losses:
                self._metrics(losses)  # what is no number is not saved
            self.save()
            raise UserError(f"Stopped at step {self.step}; all is saved. {error}") from error

    def _anyone(self, wanted: bool) -> bool:
        """Whether any process wants it."""
        if self.accelerator.num_processes == 1:
            return wanted
        votes = self.accelerator.reduce(torch.tensor(float(wanted), device=self.accelerator.device), "sum")
        return bool(votes.item() > 0)

    def _metrics(self, losses: list[Tensor]) -> dict[str, float]:
        loss = torch.stack(losses).mean().item()  # waits for the steps, which a GPU may still be at
        seconds = time.perf_counter() - self._since
        if not math.isfinite(loss):
            raise self._no_numbers("The loss is no number")
        pictures = len(losses) * self.config.batch_size * self.accelerator.num_processes
        return {"loss": loss, "lr": self.state.optimizer.param_groups[0]["lr"], "images_per_second": pictures / seconds}

    def _no_numbers(self, fact: str) -> UserError:
        return UserError(
            f"{fact} any more at step {self.step}; nothing was written over, so resume from the last "
            f"checkpoint with a lower --lr than {self.config.lr:g}."
        )

    def draw_samples(self) -> Path:
        """Write RUN/samples/step-000500.png: always the same seeds, a row for each class."""
        names = self.dataset.label_names
        rows = len(names[:10]) or 4
        labels = [row for row in range(rows) for _ in range(_GRID_COLUMNS)] if names else None
        self.training_step.release()  # the autoencoder may want its memory
        with self.state.averaged(), self.codec.on(self.accelerator.device):
            # as many at once as a step has room for
            count, batch_size = rows * _GRID_COLUMNS, self.config.batch_size
            batches = draw_in_batches(self.pipeline(), labels, count, batch_size)
            images = list(itertools.chain.from_iterable(batches))
        return self.folder.save_samples(draw_grid(images, _GRID_COLUMNS, row_names=names[:rows]), self.step)
