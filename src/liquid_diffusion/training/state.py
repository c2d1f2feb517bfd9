"""What a step of a training changes and a checkpoint holds: weights, moments, averages, random numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor

from liquid_diffusion.config import RunConfig
from liquid_diffusion.data.stream import PictureStream
from liquid_diffusion.errors import UserError, is_out_of_memory
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.training.optimizer import channel_mixers, condition_weights, optimizer_of


class TrainingState:
    """All that a step changes. Every process has one, and writes and reads its own part of a checkpoint.

    Args:
        accelerator: brings model and optimiser to the device.
        model: trained in place.
        run: its optimiser, averages and seed.
        stream: the data where they are one, whose place is part of the state.

    Attributes:
        model: without what `accelerator` puts around it.
        wrapped: with it; what a step calls.
        optimizer: of `model`.
        ema: averages of its weights.
        generator: of times, noise and hidden labels.
    """

    def __init__(
        self, accelerator: Accelerator, model: LiquidUNet, run: RunConfig, stream: PictureStream | None = None
    ) -> None:
        self.accelerator, self.model, self.stream = accelerator, model, stream
        self.generator = torch.Generator(accelerator.device).manual_seed(run.seed + accelerator.process_index)
        mixers = channel_mixers(model) if run.optimizer == "muon" else ()
        optimizer = optimizer_of(model, mixers, condition_weights(model), run.lr, run.weight_decay)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        # after prepare, which gives every process the weights of the first
        self.ema = EMAModel(model.parameters(), decay=run.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self._ema_on_cpu = run.ema_on_cpu
        self._place_averages()

    def average(self) -> None:
        """Let the averages follow the weights by one step."""
        parameters: list[Tensor] = list(self.model.parameters())
        if self._ema_on_cpu:  # EMAModel averages what wants a gradient, and copies all else
            parameters = [parameter.detach().cpu().requires_grad_() for parameter in parameters]
        self.ema.step(parameters)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        parameters = list(self.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def save(self, folder: Path) -> None:
        """Write this process's part; of several, all have to call it."""
        self.accelerator.save_state(str(folder))  # each process adds its random state
        torch.save(self.generator.get_state(), self._own(folder, "generator", "pt"))
        if self.stream is not None:
            self._own(folder, "stream", "json").write_text(json.dumps(self.stream.state()))
        if self.accelerator.is_main_process:
            torch.save(self.ema.state_dict(), folder / "ema.pt")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: it is damaged, or of a version of this package whose model or optimiser was another one.
        """
        try:
            self.accelerator.load_state(str(folder))
            averaged = torch.load(folder / "ema.pt", map_location="cpu", weights_only=True)
            generator = torch.load(self._own(folder, "generator", "pt"), map_location="cpu", weights_only=True)
            if self.stream is not None:
                position = json.loads(self._own(folder, "stream", "json").read_text())
        except (UnpicklingError, RuntimeError, ValueError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"The checkpoint {folder} is damaged, or was written by another version of this package: delete it to "
                "resume from the one before, or choose another --out."
            ) from error
        self.ema.load_state_dict(averaged)
        self._place_averages()
        self.generator.set_state(generator)
        if self.stream is not None:
            self.stream.load_state(position)

    def _place_averages(self) -> None:
        self.ema.to("cpu" if self._ema_on_cpu else self.accelerator.device)

    def _own(self, folder: Path, name: str, ending: str) -> Path:
        """This process's file of that name."""
        return folder / f"{name}-{self.accelerator.process_index}.{ending}"
