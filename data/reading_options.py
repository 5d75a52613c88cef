"""The options of every command that reads files of point clouds or meshes."""

from dataclasses import dataclass, fields
from typing import Literal

from minigpt3d.arguments import option


@dataclass(kw_only=True)
class ReadingOptions:
    """How to read files, such as ones that lack an up axis or colors; each field is an argument of `load_point_cloud`."""

    up_axis: Literal["x", "y", "z"] | None = option(
        "axis that points up in your files; they are rotated so that y points up (default: the model's setting, if there is "
        "one; else no rotation)",
        default=None,
    )
    missing_color: Literal["black", "gray", "white"] | None = option(
        "color of points that have none (default: black)", default=None
    )
    clean: Literal["none", "outliers", "floor", "all"] | None = option(
        "what is removed from your files: points far from all others, a floor below the object, or both (default: the "
        "model's setting, if there is one; none for pack and evaluate)",
        default=None,
    )

    @property
    def reading(self) -> dict[str, str]:
        """The arguments that were given."""
        given = {field.name: getattr(self, field.name) for field in fields(ReadingOptions)}
        return {name: value for name, value in given.items() if value is not None}
