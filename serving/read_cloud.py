"""What the processes that read clouds import: it is light, and holds no web server."""

from pathlib import Path

from minigpt3d.point_cloud_minigpt3d import CloudFacts, Orientation, load_orientations
from minigpt3d.readers_minigpt3d import ReadingLimits, limited


def read_cloud(
    source: Path | str, max_download_bytes: int, max_download_seconds: float, **arguments
) -> tuple[list[Orientation], CloudFacts]:
    """`load_orientations` of a file or an `https://` URL, with these limits of a download."""
    limits = ReadingLimits(max_download_bytes=max_download_bytes, max_download_seconds=max_download_seconds)
    with limited(limits):
        return load_orientations(source, **arguments)
