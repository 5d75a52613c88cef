"""Stage IV: eight query experts specialize while a router learns to choose among them.

What it trains, on which data and how fast is `STAGE_4` in training/stages.py.

accelerate launch training/stage4.py --init stage3 --data packed --output_dir stage4
"""

from minigpt3d.training.command import main


if __name__ == "__main__":
    main("IV")
