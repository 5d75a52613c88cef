"""`minigpt3d look`: a page that shows which parts of an object the model's queries attend to."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from minigpt3d.arguments import option, path_or_url
from minigpt3d.files import check_new_file, write_text
from minigpt3d.sources_minigpt3d import source_name

from .inference import InferenceOptions, read_file


HELP = "show which parts of an object the model's queries attend to"
DESCRIPTION = (
    "Write a page with the point cloud, which can be turned, colored by the attention of each query of the Q-Former; it "
    "needs no network. The page lists the query experts that the router chose, and their weights."
)


@dataclass(kw_only=True)
class Options(InferenceOptions):
    path: Path | str = option(
        "point cloud or mesh, or an https:// URL", positional=True, type=path_or_url, metavar="FILE"
    )
    out: Path = option("page to write, .html", metavar="FILE")


def run(options: Options, argv: list[str]) -> int:
    """Write the page, print the answer; returns the exit code."""
    if find_spec("plotly") is None:
        raise ImportError("The page is drawn by plotly: pip install 'minigpt3d[look]'")
    check_new_file("out", options.out, [options.path])
    from minigpt3d.evaluation.attention import draw_page, measure_attention

    pipeline, cloud = read_file(options.path, options)
    (output,) = pipeline(cloud, up_axis="y", max_new_tokens=options.max_new_tokens)
    attention = measure_attention(pipeline.model, cloud)
    name = source_name(options.path).rpartition("/")[2]
    write_text(options.out, draw_page(name, output["generated_text"], cloud, attention))
    print(output["generated_text"])
    print(f"experts: {', '.join(f'{number} ({weight:.2f})' for number, weight in attention.experts)}")
    print(f"{options.out} shows what each query attends to")
    return 0
