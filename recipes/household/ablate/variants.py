"""The variants as a table: the household recipe with one thing changed in each."""

from dataclasses import dataclass, field, replace

from minigpt3d.training.stages import RECIPES, Lora, Stage


STAGES = ("I", "II", "III", "IV")


@dataclass(frozen=True)
class Variant:
    """The household recipe with one thing changed.

    Args:
        name: in the report.
        group: the part of the recipe that it tests, a key of `REFERENCES`.
        stages: names of the trained stages, in order.
        changes: of the rows of all stages but the first, which the changed parts do not concern.
        last_changes: of stage IV's row.
        freeze_norms: whether the norms are frozen in all stages but the first.
        num_experts: query experts; None: as many as the recipe has.
        random_queries: whether the query tokens start at random instead of pre-trained.
    """

    name: str
    group: str
    stages: tuple[str, ...] = STAGES
    changes: dict = field(default_factory=dict)
    last_changes: dict = field(default_factory=dict)
    freeze_norms: bool = False
    num_experts: int | None = None
    random_queries: bool = False


FULL = Variant("full recipe", "")
VARIANTS = (
    FULL,
    *(Variant(f"without stage {name}", "stages", tuple(s for s in STAGES if s != name)) for name in STAGES),
    *(Variant(f"{n} expert{'s' * (n > 1)}", "experts", num_experts=n) for n in (1, 2, 4)),
    *(Variant(f"router {router}", "router", last_changes={"router_type": router}) for router in ("none", "constant", "soft")),
    *(
        Variant(f"LoRA rank {rank}", "LoRA rank", changes={"language_lora": Lora(rank, alpha=16, dropout=0.05)})
        for rank in (2, 64)
    ),
    Variant("norms frozen", "norms", freeze_norms=True),
    Variant("random queries", "queries", random_queries=True),
)  # fmt: skip
# What the recipe itself has, for each group.
REFERENCES = {"stages": "all four", "experts": "8 experts", "router": "router sparse", "LoRA rank": "LoRA rank 16",
              "norms": "norms trained", "queries": "pre-trained queries"}  # fmt: skip


def stage_rows(variant: Variant, scale: float) -> list[Stage]:
    """The rows of the stages that the variant trains; `scale` is their length, 1 the recipe's."""
    rows = []
    for name in variant.stages:
        row = RECIPES["household"][name]
        if name != "I":
            row = replace(row, **variant.changes | (variant.last_changes if name == "IV" else {}))
            if variant.freeze_norms:
                row = replace(row, trainable=tuple(p for p in row.trainable if "norm" not in p.lower()))
        rows.append(
            replace(
                row,
                steps_per_epoch=max(2, round(row.steps_per_epoch * scale)),
                warmup_steps=max(1, round(row.warmup_steps * scale)),
            )
        )
    return rows
