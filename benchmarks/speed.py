"""Time of a training step and of sampling, ours beside its peers of equal parameters, interleaved in one run.

    python benchmarks/speed.py                       # tiny: batch 1 and 8, latents 32, 64, 128 (256, 512, 1024 px)
    python benchmarks/speed.py --preset nano --sizes 32 --batches 8
    python benchmarks/speed.py --plot                # only draw what the CSV holds

All models run in the same arithmetic (bfloat16 by autocast where the machine is fast in it) and in the memory layout
that suits them. Rows are appended to benchmarks/results/speed.csv; the figures are drawn from it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from figures import RESULTS, Row, read_rows
from peers import EagerLiquidUNet, check_size, compile_for_training, dit, unet2d
from torch import Tensor, nn

from liquid_diffusion.codecs import AutoencoderCodec
from liquid_diffusion.compile import CompiledVelocity, compile_for_sampling
from liquid_diffusion.estimate import SD_VAE
from liquid_diffusion.export import export_onnx
from liquid_diffusion.hardware import fastest_dtype, keep_freed_memory
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler, solver_times
from liquid_diffusion.training.recording import RecordedGradients

CHANNELS, CLASSES, STEPS = 4, 9, 25
_CALLS_ON_A_GPU = 10
_SECONDS_OF_A_RUN = 1.0  # on a CPU
COLUMNS = [
    "commit",
    "machine",
    "task",
    "preset",
    "model",
    "batch",
    "latent",
    "median_ms",
    "least_ms",
    "most_ms",
    "runs",
]
OURS = "LiquidUNet"
EACH = f"{OURS}, a class for each"


def machine(device: torch.device) -> str:
    """The card; or the cores, their architecture, and what the processor multiplies bfloat16 with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    units = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512_BF16": torch.cpu._is_avx512_bf16_supported()}
    best = next((name for name, there in units.items() if there), "no bfloat16")
    return f"{torch.get_num_threads()} cores {platform.machine()}, {best}"


def build(name: str, size: int, device: torch.device) -> dict[str, nn.Module]:
    ours = LiquidUNet.from_preset(name, CHANNELS, CLASSES)
    count = sum(parameter.numel() for parameter in ours.parameters())
    peers = {
        "eager transcription": EagerLiquidUNet(name, CHANNELS, CLASSES),
        "UNet2DModel": unet2d(name, CHANNELS, CLASSES, size),
        "DiTTransformer2DModel": dit(name, CHANNELS, CLASSES, size),
    }
    for peer in peers.values():
        check_size(peer, count)
    models: dict[str, nn.Module] = {OURS: ours, **peers}
    return {
        key: model.to(device, memory_format=torch.preserve_format if "DiT" in key else torch.channels_last)
        for key, model in models.items()
    }


def take_turns(functions: dict[str, Callable[[], object]], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of a call of each function in each run, one after the other, after two that are not counted.

    A run is the mean of some calls without a pause, as a loop makes them, and with what the last one left in the
    caches: on a GPU ten, whose results nobody waits for; on a CPU as many as fit into a second, at most the evaluations
    of a picture.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, _CALLS_ON_A_GPU if device.type == "cuda" else 1)
    for run in range(runs + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / calls[name]
            if run > 1:
                times[name].append(1000 * seconds)
            elif run and device.type == "cpu":  # the first is not like the others: it compiles, and takes its memory
                calls[name] = min(max(1, int(_SECONDS_OF_A_RUN / seconds)), STEPS)
    return times


def batch_of(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, CHANNELS, size, size, device=device).to(memory_format=torch.channels_last)
    return x, torch.rand(batch, device=device), torch.arange(batch, device=device) % CLASSES


def training_steps(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """Forward, backward and AdamW: ours as the trainer has it, compiled, and as it is; others as they are."""
    eager = {f"{name}, not compiled" if name == OURS else name: model for name, model in models.items()}
    return steps_of({OURS: models[OURS]}, batch, size, device, "default") | steps_of(
        eager, batch, size, device, "force_eager"
    )


def compiled_steps(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """A training step of each model compiled, except for the transcription."""
    some = {name: model for name, model in models.items() if "eager" not in name}
    return steps_of(some, batch, size, device, "default")


def float32_steps(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """A training step in float32, for machines that are not fast in bfloat16; beside it ours where one is."""
    ours, transcription = models[OURS], {"eager transcription": models["eager transcription"]}
    functions = steps_of({OURS: ours}, batch, size, device, "default", torch.float32)
    functions |= steps_of(transcription, batch, size, device, "force_eager", torch.float32)
    if fastest_dtype(device) != torch.float32:
        functions |= steps_of({f"{OURS}, bfloat16": copy.deepcopy(ours)}, batch, size, device, "default")
    return functions


def steps_of(
    models: dict[str, nn.Module],
    batch: int,
    size: int,
    device: torch.device,
    stance: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Callable]:
    """Training steps under a stance of torch.compile: "default", on a GPU recorded too, or "force_eager".

    In a dtype, or in the one that the machine is fast in.
    """
    batch_given = batch_of(batch, size, device)
    dtype = dtype or fastest_dtype(device)

    def step_of(model: nn.Module) -> Callable[[], None]:
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

        def compute(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with (
                torch.compiler.set_stance(stance),
                torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            ):
                out = model(x, t, labels)
            loss = nn.functional.mse_loss((out if isinstance(out, Tensor) else out.sample).float(), x)
            loss.backward()
            return loss.detach()

        recorded = stance == "default" and device.type == "cuda"
        gradients = RecordedGradients(compute, parameters, batch_given) if recorded else compute

        def step() -> None:
            gradients(*batch_given)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    if stance == "default":  # all of them before the first step: it forgets what was compiled
        for model in models.values():
            compile_for_training(model)
    return {name: step_of(model) for name, model in models.items()}


def schedule(device: torch.device) -> list[float]:
    return solver_times(make_scheduler(), STEPS, device)


def plain(
    model: nn.Module, x: Tensor, t: Tensor, labels: Tensor, dtype: torch.dtype | None = None
) -> Callable[[], Tensor]:
    """One evaluation of a model as it is, in a dtype or in the one that the machine is fast in."""
    dtype = dtype or fastest_dtype(x.device)

    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def evaluate() -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out = model(x, t, labels)
        return out if isinstance(out, Tensor) else out.sample

    return evaluate


def evaluation(
    models: dict[str, nn.Module], batch: int, size: int, device: torch.device
) -> tuple[LiquidUNet, list[float], Tensor, Tensor, Tensor]:
    """Our model, the times of a schedule, and the fourth evaluation of a batch: x, t and labels."""
    x, _, labels = batch_of(batch, size, device)
    times = schedule(device)
    ours = models[OURS]
    assert isinstance(ours, LiquidUNet)
    return ours, times, x, torch.full((batch,), times[3], device=device), labels


def samplings(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """One evaluation of each model; of ours as the sampler runs it without classes, and with one for each picture."""
    ours, times, x, t, labels = evaluation(models, batch, size, device)
    same, each = (compile_for_sampling(ours, times, some) for some in (labels[0], labels))
    return {
        OURS: lambda: same(x, t),
        **({EACH: lambda: each(x, t)} if batch > 1 else {}),
        f"{OURS}, not compiled": plain(ours, x, t, labels),
        **{name: plain(model, x, t, labels) for name, model in models.items() if name != OURS},
    }


def compiled_samplings(
    models: dict[str, nn.Module], batch: int, size: int, device: torch.device
) -> dict[str, Callable]:
    """One evaluation on a GPU without launches from Python: ours as it is sampled, peers in the same dtype.

    A peer is recorded as a CUDA graph like ours, as it is and with its kernels fused by torch.compile; ours in the
    latter way too, which `sample` does not do: it would compile for longer than it draws.
    """
    ours, times, x, t, labels = evaluation(models, batch, size, device)
    dtype = fastest_dtype(device)
    sampler = compile_for_sampling(ours, times, labels[0])
    assert isinstance(sampler, CompiledVelocity)
    latents, row = x.to(dtype), sampler.steps[3:4]
    fused = torch.compile(sampler._forward, dynamic=False)
    functions: dict[str, Callable] = {OURS: lambda: sampler(x, t)}
    with torch.no_grad():
        functions[f"{OURS}, fused"] = recorded(lambda: fused(latents, row))
        for name in ("UNet2DModel", "DiTTransformer2DModel"):
            peer = copy.deepcopy(models[name]).to(dtype).eval()
            functions[name] = recorded(lambda peer=peer: peer(latents, t, labels))
            peer = torch.compile(peer, dynamic=False)
            functions[f"{name}, fused"] = recorded(lambda peer=peer: peer(latents, t, labels))
    return functions


def recorded(function: Callable[[], object]) -> Callable[[], object]:
    """A function of fixed inputs as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(alive: Callable[[], object] = function) -> None:  # whose weights the graph reads
        del alive
        graph.replay()

    return replay


def edge(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """One evaluation in float32, for machines that are not fast in bfloat16: PyTorch beside onnxruntime.

    And beside both the sampler in bfloat16, as it is where a machine is fast in it.
    """
    import onnxruntime

    ours, times, x, t, labels = evaluation(models, batch, size, device)
    compiled = compile_for_sampling(ours, times, labels[0], dtype=torch.float32)
    codec = sd_vae(device)
    pipeline = LiquidDiffusionPipeline(ours, make_scheduler(), codec.vae, codec.state())
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(pipeline, Path(folder))
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it slows whoever comes next
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = {"sample": x.contiguous().numpy(), "timestep": t.numpy(), "class_labels": labels.numpy()}
    functions: dict[str, Callable] = {
        OURS: lambda: compiled(x, t),
        f"{OURS}, not compiled": plain(ours, x, t, labels, torch.float32),
        "eager transcription": plain(models["eager transcription"], x, t, labels, torch.float32),
        f"{OURS}, onnxruntime": lambda: session.run(None, inputs),
    }
    if fastest_dtype(device) != torch.float32:
        fast = compile_for_sampling(ours, times, labels[0])
        functions[f"{OURS}, bfloat16"] = lambda: fast(x, t)
    return functions


def sd_vae(device: torch.device) -> AutoencoderCodec:
    """The codec of the latents, of random weights."""
    return AutoencoderCodec(AutoencoderKL(**SD_VAE).to(device), "sd-vae")


def with_decoder(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """25 evaluations and the SD-VAE's decoder, of random weights: what a person waits for."""
    x, _, labels = batch_of(batch, size, device)
    t = torch.full((batch,), schedule(device)[3], device=device)
    codec = sd_vae(device)
    evaluations = samplings(models, batch, size, device)

    def sampling(evaluate: Callable[[], Tensor]) -> Callable[[], None]:
        def sample() -> None:
            for _ in range(STEPS):
                latents = evaluate()
            codec.decode(latents)

        return sample

    functions = {name: sampling(evaluations[name]) for name in evaluations if name == OURS or "," not in name}
    return {**functions, "decoder alone": lambda: codec.decode(plain(models[OURS], x, t, labels)())}


TASKS: dict[str, Callable[..., dict[str, Callable]]] = {
    "evaluation": samplings,
    "evaluation, all compiled": compiled_samplings,
    "training step": training_steps,
    "training step, all compiled": compiled_steps,
    "evaluation in float32": edge,
    "training step in float32": float32_steps,
    "sampling with decoder": with_decoder,
}


def is_worth_it(task: str, batch: int, size: int, device: torch.device) -> bool:
    """On a CPU some combinations take the peers minutes and nobody runs them."""
    if task == "training step":
        return batch > 1 and (device.type != "cpu" or size <= 64)
    if task == "training step, all compiled":  # UNet2DModel takes two minutes of compilation
        return batch > 1 and size == 32
    if task == "evaluation, all compiled":
        return device.type == "cuda" and batch > 1
    if task.endswith("in float32"):
        return device.type == "cpu" and size == 32 and (batch > 1 or task.startswith("evaluation"))
    if task == "sampling with decoder":
        return device.type != "cpu" or (batch, size) == (1, 32)
    return True


def measure(preset: str, sizes: list[int], batches: list[int], tasks: list[str], runs: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "speed.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for size in sizes:
            models = build(preset, size, device)
            for batch in batches:
                for task, make in TASKS.items():
                    if task not in tasks or not is_worth_it(task, batch, size, device):
                        continue
                    times = take_turns(make(models, batch, size, device), runs, device)
                    for name, some in times.items():
                        middle = statistics.median(some)
                        row = [commit.stdout.strip(), machine(device), task, preset, name, batch, size]
                        digits = 1 if device.type == "cpu" else 3
                        figures = [f"{value:.{digits}f}" for value in (middle, min(some), max(some))]
                        writer.writerow([*row, *figures, runs])
                        ratio = middle / statistics.median(times[OURS])
                        case = f"{task:22} {preset} batch {batch} latent {size:3} {name:26}"
                        print(f"{case}{figures[0]:>9} ms {ratio:6.2f}", flush=True)
                    file.flush()


def of_processor(rows: list[Row], amx: bool) -> list[Row]:
    """Rows of the processor with AMX that was measured last, or of the one without; a GPU is neither."""
    rows = [row for row in rows if not row["machine"].startswith("NVIDIA") and row["machine"].endswith("AMX") == amx]
    return [row for row in rows if row["machine"] == rows[-1]["machine"]]


def replace_rows(path: Path, rows: list[Row]) -> None:
    """Write the rows of a machine into a CSV, in place of those that it had there."""
    rows = [row for row in read_rows(path) if row["machine"] != rows[0]["machine"]] + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[Row], picture: Path) -> None:
    """Time of an evaluation of tiny against pixels, with the fitted exponent; of rows of one processor."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["preset"] == "tiny" and row["task"] == "evaluation"]
    if not rows:
        return
    batch = max((row["batch"] for row in rows), key=int)
    rows = [row for row in rows if row["batch"] == batch and "," not in row["model"]]
    latest = {(row["model"], int(row["latent"])): float(row["median_ms"]) for row in rows}
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["model"] for row in rows):
        sizes = sorted(size for model, size in latest if model == name)
        pixels = [size**2 for size in sizes]
        times = [latest[name, size] for size in sizes]
        label = name
        if len(sizes) > 1:
            label += f", exponent {np.polyfit(np.log(pixels), np.log(times), 1)[0]:.2f}"
        axes.loglog(pixels, times, "o-", label=label)
    axes.set_xlabel("latent pixels")
    axes.set_ylabel(f"ms per evaluation, batch {batch}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    if not arguments.plot:
        measure(arguments.preset, arguments.sizes, arguments.batches, arguments.tasks, arguments.runs)
    rows = read_rows(RESULTS / "speed.csv")
    draw(of_processor(rows, amx=False), RESULTS / "speed.png")
    draw(of_processor(rows, amx=True), RESULTS / "speed-amx.png")


if __name__ == "__main__":
    main()
