"""Publish results on the Hub: a commit for each, a tag for each stage. huggingface_hub finds the token."""

import shutil
import sys
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from minigpt3d.messages import one_line


# Files of an earlier result that do not belong beside a later one, such as an adapter's beside a complete model.
REPLACED_FILES = [
    "adapter_*",
    "adapter/*",
    "model*.safetensors*",
    "config.json",
    "generation_config.json",
    "stage.json",
]


def check_login():
    """
    Raises:
        ValueError: nobody is logged in to the Hub.
    """
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise ValueError(
            f"`push_to_hub`: not logged in to the Hub ({one_line(error)[:150]}). Run `hf auth login`, or train without "
            "`push_to_hub` and upload the result later."
        ) from error


class Publisher:
    """Uploads folders to one model repository. A failed upload is reported with the command that repeats it.

    Args:
        repo_id: OWNER/NAME; created at the first upload.
        private: whether a new repository is private.
    """

    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private = repo_id, private
        self.api = HfApi()
        self.running: Future | None = None

    def push(self, folder: Path, message: str, tag: str):
        """Upload a folder as a commit and tag it; an existing tag is moved."""
        self.wait()
        try:
            self._upload(folder, message)
            with suppress(HfHubHTTPError):  # there is none yet
                self.api.delete_tag(self.repo_id, tag=tag)
            self.api.create_tag(self.repo_id, tag=tag, tag_message=message)
        except Exception as error:
            again = f"hf upload {self.repo_id} {folder} --exclude 'logs/*'{' --private' if self.private else ''}"
            problem = f"{folder} was not published: {one_line(error)[:300]}"
            print(f"{problem}\nIt is on disk; try again: {again}", file=sys.stderr)
        else:
            print(f"{folder} is published: {self.api.endpoint}/{self.repo_id}")

    def push_in_background(self, folder: Path, message: str):
        """Upload while the run continues, unless an upload is running; the folder is removed afterwards."""
        if self.running is not None and not self.running.done():
            shutil.rmtree(folder)
            return
        self.wait()

        def upload():
            try:
                self._upload(folder, message)
            except Exception as error:  # the next upload brings newer weights
                print(f"{message} was not published: {one_line(error)[:300]}", file=sys.stderr)
            shutil.rmtree(folder)

        self.running = self.api.run_as_future(upload)

    def wait(self):
        """Wait for the upload in the background."""
        if self.running is not None:
            self.running.result()
            self.running = None

    def _upload(self, folder: Path, message: str):
        self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=REPLACED_FILES,
            ignore_patterns="logs/*",
        )
