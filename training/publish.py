"""Results on the Hub: a commit for each, a tag for each stage. The token is huggingface_hub's own affair."""

import re
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


# Of an earlier result, and wrong beside a later one: an adapter's files beside a whole model, for one.
OURS = ["adapter_*", "adapter/*", "model*.safetensors*", "config.json", "generation_config.json", "stage.json"]


def check_repository(repo_id: str):
    """
    Raises:
        ValueError: it is no name of a repository, or nobody is logged in.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"--hub_model_id {repo_id}: a repository is named OWNER/NAME.")
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: all before the run, not after it
        raise ValueError(
            f"--push_to_hub: the Hub does not know you ({' '.join(str(error).split())[:150]}). Run `hf auth login`, or train "
            "without --push_to_hub and upload the result later."
        ) from error


class Publisher:
    """Uploads folders to one model repository. An upload that fails is told, with the command that repeats it.

    Args:
        repo_id: OWNER/NAME; made when it is first needed.
        private: of a new repository.
    """

    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private = repo_id, private
        self.api = HfApi()
        self.running: Future | None = None

    def push(self, folder: Path, message: str, tag: str | None = None) -> bool:
        """A commit with what the folder holds, and a tag on it; a tag of this name is moved. Returns whether it worked."""
        self.wait()
        try:
            self._upload(folder, message)
            if tag is not None:
                try:
                    self.api.delete_tag(self.repo_id, tag=tag)
                except HfHubHTTPError:
                    pass  # a new one
                self.api.create_tag(self.repo_id, tag=tag, tag_message=message)
        except Exception as error:  # whatever the network does, the result is on disk
            self._complain(folder, error)
            return False
        print(f"{folder} is published: {self.api.endpoint}/{self.repo_id}")
        return True

    def push_in_background(self, folder: Path, message: str):
        """Upload while the run goes on, unless the upload before still runs; the folder is removed when it is done."""
        if self.running is not None and not self.running.done():
            shutil.rmtree(folder)
            return
        self.wait()

        def upload():
            try:
                self._upload(folder, message)
            except Exception as error:  # the run goes on, and the next upload brings newer weights
                print(f"{message} was not published: {_one_line(error)}", file=sys.stderr)
            shutil.rmtree(folder)

        self.running = self.api.run_as_future(upload)

    def wait(self):
        """Let the upload in the background end."""
        if self.running is not None:
            self.running.result()
            self.running = None

    def _upload(self, folder: Path, message: str):
        self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=OURS,
            ignore_patterns="logs/*",
        )

    def _complain(self, folder: Path, error: Exception):
        again = f"hf upload {self.repo_id} {folder} --exclude 'logs/*'{' --private' if self.private else ''}"
        print(f"{folder} was not published: {_one_line(error)}\nIt is on disk; try again: {again}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
