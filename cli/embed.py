"""`minigpt3d embed`: vectors of 3D models, to find similar ones."""

from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from minigpt3d.arguments import option
from minigpt3d.files import check_new_file, written_file

from .batches import FilesOptions, Progress, file_of, work_on_files
from .console import EXIT_CODES, FAILED, complain


HELP = "write a vector for each file, to find similar objects"
DESCRIPTION = (
    "Write a table with a row for each file: path and embedding. The embedding is the 3D encoder's cls token, scaled to "
    "length 1: the inner product of two is their cosine similarity. Errors are on standard error; the table has the other files."
)
EPILOG = EXIT_CODES


@dataclass(kw_only=True)
class Options(FilesOptions):
    out: Path = option("table to write, .parquet or .npz (arrays `path` and `embedding`)", metavar="FILE")


def run(options: Options, argv: list[str]) -> int:
    """Write the table; returns the exit code."""
    out, suffix = options.out, options.out.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"`out` {out}: {suffix or 'no extension'}; expected {' or '.join(WRITERS)}")
    check_new_file("out", out, options.paths)
    if suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError(
            "A .parquet file is written by pyarrow: pip install 'minigpt3d[train]', or write a .npz file"
        )
    progress = Progress.of(options.paths, own=(out,), verb="embedded")
    paths, embeddings = [], []
    if progress.files:
        with closing(
            work_on_files(progress, options, lambda pipeline: lambda clouds: embed(pipeline, clouds))
        ) as batches:
            for result, embedding in chain.from_iterable(batches):
                if not isinstance(embedding, Exception):
                    paths.append(file_of(result.path))
                    embeddings.append(embedding)
        if progress.has_folder:
            complain(progress.summary())
    if paths:
        with written_file(out) as partial:
            WRITERS[suffix](partial, paths, embeddings)
    else:
        complain(f"nothing to write to {out}")
    return FAILED if progress.failed else 0


def embed(pipeline, clouds: list) -> list:
    """The embedding of each cloud (P, 6), y up: (D_point,) float32 of length 1."""
    import numpy as np
    import torch

    encoder = pipeline.model.model.point_encoder
    with torch.inference_mode():
        tokens = encoder(torch.from_numpy(np.stack(clouds)).to(pipeline.device)).last_hidden_state  # (B, 1+G, D)
    return list(torch.nn.functional.normalize(tokens[:, 0].float(), dim=-1).cpu().numpy())


def write_parquet(file: Path, paths: list[str], embeddings: list):
    """A row for each path, with a list of float32."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet

    matrix = np.stack(embeddings)
    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
    pyarrow.parquet.write_table(pa.table({"path": paths, "embedding": column}), file)


def write_npz(file: Path, paths: list[str], embeddings: list):
    """Arrays `path` (files,) of text and `embedding` (files, D_point)."""
    import numpy as np

    with open(file, "wb") as stream:  # a name would get the extension again
        np.savez(stream, path=np.array(paths), embedding=np.stack(embeddings))


WRITERS = {".parquet": write_parquet, ".npz": write_npz}
