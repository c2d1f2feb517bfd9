"""What a training is fed with: pictures, latents encoded before, or a stream, by one face."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader

from liquid_diffusion.codecs import Codec
from liquid_diffusion.config import RunConfig
from liquid_diffusion.data.encode import Encoding, encoding_of, is_whole
from liquid_diffusion.data.latents import LatentDataset
from liquid_diffusion.data.parallel import errors_of_workers, leave_ending_to_main_process
from liquid_diffusion.data.pictures import BucketedBatches, PictureDataset, collate
from liquid_diffusion.data.shapes import bucket_shapes
from liquid_diffusion.data.sources import BadPicture, listing_of, open_shards, open_source
from liquid_diffusion.data.split import split
from liquid_diffusion.data.stream import PictureStream
from liquid_diffusion.errors import UserError
from liquid_diffusion.hardware import at_most_cores, process_state

_NAMES_TOLD = 3  # of classes, besides the last one

Feed = PictureDataset | LatentDataset | PictureStream


def open_pictures(run: RunConfig, multiple: int) -> tuple[PictureDataset | PictureStream, int | None]:
    """The pictures to train on.

    Args:
        run: says which, how they are cropped, and whether they are streamed where they can be.
        multiple: sides of the shapes of buckets are divisible by it.

    Returns:
        Also the number of those held out; None for a stream, which knows them only when it meets them.

    Raises:
        UserError: they can't be had.
    """
    place = run.data, run.image_column, run.label_column
    if run.streaming and (shards := open_shards(*place)) is not None:
        return PictureStream(shards, run.image_size, run.flip, run.seed, run.val_fraction, run.crop), None
    source = open_source(*place)
    chosen, held_out = split(source, run.val_fraction)
    shapes = bucket_shapes(run.image_size, multiple) if run.buckets else None
    return PictureDataset(source, run.image_size, run.flip, run.seed, chosen, run.crop, shapes), len(held_out)


def open_latents(run: RunConfig, codec: Codec, begin: Callable[[], None]) -> tuple[LatentDataset, int]:
    """The latents to train on; they are encoded first where they are the run's own and not all there.

    Args:
        run: says which.
        codec: the autoencoder of the training.
        begin: called by the first process before anything is written into the run folder.

    Returns:
        Also the number of pictures held out.

    Raises:
        UserError: they can't be had, or are not what the run wants.
    """
    own = run.cache_latents is True
    folder = Path(run.out if own else str(run.cache_latents)).expanduser() / ("latents" if own else "")
    to_encode = own and not is_whole(folder)
    if to_encode:
        state = process_state()
        encoding = Encoding(encoding_of(run, folder), codec, state)
        if state.is_main_process:
            begin()
        state.print(encoding.summary())
        encoding.run()
    dataset = LatentDataset(folder, run, codec)
    if not to_encode:  # else it has just been seen
        _check_unchanged(run, dataset)
    return dataset, dataset.held_out


def _check_unchanged(run: RunConfig, latents: LatentDataset) -> None:
    """See that pictures which lie here are those that were encoded, of the same classes.

    They may be gone altogether, and are not looked for elsewhere: nothing but the latents is needed any more.
    """
    if not Path(run.data).is_dir():
        return
    try:
        source = open_source(run.data, run.image_column, run.label_column)
    except UserError:
        return
    now, before = len(source), latents.total
    what = f"it had {before} pictures, now {now}" if now != before else "files were renamed, or moved between classes"
    if now != before or (latents.listing is not None and latents.listing != listing_of(source)):
        raise UserError(
            f"{run.data} has changed since its latents in {latents.folder} were written: {what}; choose other folders "
            "for the run and its latents to train on what is there now."
        )


def describe(feed: Feed, run: RunConfig, held_out: int | None) -> str:
    """How many pictures of what kind a run has."""
    classes = ""
    if names := feed.label_names:
        more = f", ... {names[-1]}" if len(names) > _NAMES_TOLD else ""
        classes = f" in {len(names)} classes ({', '.join(names[:_NAMES_TOLD])}{more}{_without_pictures(feed)})"
    streamed = isinstance(feed, PictureStream)
    shapes = f" in {len(feed.groups)} shapes" if run.buckets and not isinstance(feed, PictureStream) else ""
    share = f"{run.val_fraction:.0%} of them" if held_out is None else f"{held_out} more"
    besides = f" ({share} held out)" if run.val_fraction else ""
    return f"{len(feed)} {'streamed ' if streamed else ''}pictures{classes} of {run.image_size} px{shapes}{besides}"


def _without_pictures(feed: Feed) -> str:
    """The classes that have none, as where all of their few are held out; as far as that is known."""
    met = None if isinstance(feed, PictureStream) else feed.classes_met
    if met is None or not (never := [name for number, name in enumerate(feed.label_names) if number not in met]):
        return ""
    more = f" and {len(never) - _NAMES_TOLD} more" if len(never) > _NAMES_TOLD else ""
    return f"; no picture to train on: {', '.join(never[:_NAMES_TOLD])}{more}"


def open_batches(
    feed: Feed, batch_size: int, start: int, workers: int
) -> Iterator[tuple[Tensor, Tensor, list[BadPicture]]]:
    """Batches of this process among those of its launch, without end.

    Args:
        feed: a stream goes on from its own positions.
        batch_size: pictures of a batch of this process.
        start: number of the first batch.
        workers: processes that read, at most as many as there are cores; none where all is in memory.

    Yields:
        images or latents' posteriors (B, ...), labels (B,) int64, and the pictures that can't be read.

    Raises:
        UserError: the pictures can't be had any more.
    """
    state, workers = process_state(), at_most_cores(workers)
    rank, world = state.process_index, state.num_processes
    if isinstance(feed, PictureStream):
        yield from feed.batches(batch_size, start, workers, rank, world)
        return
    order = BucketedBatches([indices for _, indices in feed.groups], batch_size * world, feed.seed, start, rank, world)
    with errors_of_workers():
        yield from DataLoader(
            feed,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=0 if feed.in_memory else workers,
            worker_init_fn=leave_ending_to_main_process,
            pin_memory=state.device.type == "cuda",
        )
