"""Download the authors' release: `find_release` says what, from where and how large, `fetch` gets it resumably."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download
from huggingface_hub.file_download import http_get

from minigpt3d.messages import one_line


AUTHORS_ID = "YuanTang96/MiniGPT-3D"
# A file of LAVIS, not on the Hub; it has been the same since 2023.
BLIP2_URL = (
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/blip2_pretrained_flant5xxl.pth"
)
# slot → file or folder in the authors' repository
PATHS = {
    "phi": "params_weight/Phi_2/",
    "point_encoder": "params_weight/pc_encoder/point_model.pth",
    "tinygpt_v": "params_weight/TinyGPT_V_stage_3/TinyGPT-V_for_Stage3.pth",
    "stage3": "params_weight/MiniGPT_3D_stage_3/MiniGPT_3D_stage_3.pth",
    "stage4": "params_weight/MiniGPT_3D_stage_4/MiniGPT_3D_stage_4.pth",
}


@dataclass(frozen=True)
class Download:
    """Everything that will be fetched.

    Args:
        revision: commit of the authors' repository; all files are of this one.
        files: path in the repository → bytes.
        blip2_bytes: of the file at `BLIP2_URL`.
    """

    revision: str
    files: dict[str, int]
    blip2_bytes: int

    def __str__(self) -> str:
        lines = [f"{AUTHORS_ID} at {self.revision}"]
        lines += [f"  {path:<70}{size / 1e6:>10,.1f} MB" for path, size in self.files.items()]
        lines += [BLIP2_URL, f"  {'blip2_pretrained_flant5xxl.pth':<70}{self.blip2_bytes / 1e6:>10,.1f} MB"]
        total = sum(self.files.values()) + self.blip2_bytes
        return "\n".join([*lines, f"in all {total / 1e9:.1f} GB, kept in {constants.HF_HUB_CACHE}"])


def find_release(revision: str | None = None) -> Download:
    """Ask for the revision and the sizes; nothing is fetched.

    Args:
        revision: commit of the authors' repository; by default the newest.

    Raises:
        ValueError: no network, or the repository does not hold the files.
    """
    try:
        info = HfApi().model_info(AUTHORS_ID, revision=revision, files_metadata=True)
        blip2_bytes = get_hf_file_metadata(BLIP2_URL, token=False).size or 0  # the Hub's token is not for others
    except Exception as error:
        raise ValueError(
            f"cannot ask for the released files: {one_line(error)[:200]}. Check the network, or give the paths of files "
            "that you have."
        ) from error
    if not blip2_bytes:
        raise ValueError(
            f"{BLIP2_URL} does not say how large it is. Download it by hand, and give its path as `blip2`."
        )
    files = {}
    for slot, path in PATHS.items():
        sizes = {file.rfilename: file.size or 0 for file in info.siblings if file.rfilename.startswith(path)}
        if not sizes:
            raise ValueError(f"{AUTHORS_ID} at {info.sha} has no {path}; download it by hand and give it as `{slot}`.")
        files |= sizes
    return Download(info.sha, files, blip2_bytes)


def fetch(download: Download) -> tuple[dict[str, Path], dict[str, str]]:
    """Fetch what is not there yet; an interrupted download is resumed.

    Returns:
        Path of each slot, and its source.

    Raises:
        ValueError: the connection broke; what was fetched is kept.
    """
    try:
        local = {path: Path(hf_hub_download(AUTHORS_ID, path, revision=download.revision)) for path in download.files}
        paths = {"blip2": _fetch_blip2(download.blip2_bytes)}
    except Exception as error:  # each client under huggingface_hub has errors of its own
        raise ValueError(f"the download stopped: {one_line(error)[:200]}. Run it again to resume.") from error
    for slot, path in PATHS.items():
        paths[slot] = next(p for name, p in local.items() if name.startswith(path))
        if path.endswith("/"):
            depth = next(name for name in local if name.startswith(path)).removeprefix(path).count("/")
            paths[slot] = paths[slot].parents[depth]
    origins = {slot: f"{AUTHORS_ID}@{download.revision}/{path}" for slot, path in PATHS.items()}
    return paths, origins | {"blip2": BLIP2_URL}


def _fetch_blip2(size: int) -> Path:
    path = Path(constants.HF_HUB_CACHE) / "minigpt3d" / BLIP2_URL.rpartition("/")[2]
    if path.exists() and path.stat().st_size == size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    done = partial.stat().st_size if partial.exists() else 0
    if done > size:
        partial.unlink()
        done = 0
    if done < size:
        with open(partial, "ab") as file:
            http_get(BLIP2_URL, file, resume_size=done, expected_size=size)
    partial.rename(path)
    return path
