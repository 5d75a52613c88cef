"""Stage I: the point projection learns to carry the frozen encoder's features to a frozen Q-Former and language model.

What it trains, on which data and how fast is `STAGE_1` in training/stages.py.

accelerate launch training/stage1.py --init BASE --data packed --output_dir stage1
"""

from minigpt3d.training.command import main


if __name__ == "__main__":
    main("I")
