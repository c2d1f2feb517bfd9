"""A trained model on the Hub: weights, code, grid and card, and in words what went wrong."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from liquid_diffusion.errors import UserError
from liquid_diffusion.loading import find_run, load_pipeline
from liquid_diffusion.model_card import GRID, latest_grid, model_card
from liquid_diffusion.model_index import INDEX
from liquid_diffusion.pipeline import LiquidDiffusionPipeline


@contextlib.contextmanager
def _in_words(repo: str) -> Iterator[None]:
    """Whatever a person can mend, in one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no Hub id: letters, digits, - and . in OWNER/NAME.") from error
    except LocalTokenNotFoundError as error:
        raise UserError("The Hub must know who you are: log in by `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError(
                "The Hub must know who you are: log in by `hf auth login`, or set HF_TOKEN to a token that is valid."
            ) from error
        if status in (403, 404):
            raise UserError(
                f"You may not write to {repo} on the Hub: check the owner's name, and that your token may write."
            ) from error
        raise UserError(f"The Hub does not take {repo} now: {error.server_message or error}.") from error
    except (HTTPError, OSError) as error:
        raise UserError(f"The Hub can't be reached for {repo}: check the network and try again.") from error


def prepare(repo: str, private: bool = False) -> None:
    """Make a repository where there is none, so that a training does not end at one that can't be written to.

    Args:
        repo: OWNER/NAME.
        private: only of a new one; one that is there stays as it is.

    Raises:
        UserError: it is no id, nobody is logged in or may write there, or the Hub can't be reached.
    """
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise UserError(f"{repo!r} is no Hub id: say OWNER/NAME.")
    with _in_words(repo):
        HfApi().create_repo(repo, private=private, exist_ok=True)


def publish(run: str | None, repo: str, private: bool = False) -> str:
    """Push the model of a run with its code, grid and card; says in words where it is.

    Args:
        run: run folder, pipeline folder or Hub id; None for the model in this package.
        repo: OWNER/NAME; made if it is not there.
        private: only of a new one.

    Raises:
        UserError: the run can't be loaded, or see `prepare`.
    """
    pipeline = load_pipeline(run)
    prepare(repo, private)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_folder(pipeline, Path(find_run(run)).expanduser(), repo, folder)
        with _in_words(repo):
            api = HfApi()
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Model, code and card by liquid-diffusion"
            )
    return f"On the Hub: {api.endpoint}/{repo}. Pictures from it: liquid-diffusion sample {repo}"


def write_model_folder(pipeline: LiquidDiffusionPipeline, run: Path, repo: str, folder: Path) -> None:
    """What a repository holds: the pipeline, README.md and the newest grid of the run.

    A pipeline folder that has a card of its own keeps that.
    """
    pipeline.save_pretrained(str(folder))
    own = run / "README.md"
    if own.is_file() and (run / INDEX).is_file():
        shutil.copyfile(own, folder / "README.md")
    else:
        model_card(pipeline, run, repo).save(folder / "README.md")
    grid = latest_grid(run)
    if grid is not None:
        shutil.copyfile(grid, folder / GRID)
