"""Stage II: Q-Former, projections and language model learn to name objects together.

What it trains, on which data and how fast is `STAGE_2` in training/stages.py.

accelerate launch training/stage2.py --init stage1 --data packed --output_dir stage2
"""

from minigpt3d.training.command import main


if __name__ == "__main__":
    main("II")
