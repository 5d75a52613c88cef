"""Stage III: the same parameters learn detailed descriptions and conversations.

What it trains, on which data and how fast is `STAGE_3` in training/stages.py.

accelerate launch training/stage3.py --init stage2 --data packed --output_dir stage3
"""

from minigpt3d.training.command import main


if __name__ == "__main__":
    main("III")
