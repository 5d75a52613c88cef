"""Your own objects: train a finished model on the output of `minigpt3d pack --from`.

What it trains and how fast is `OWN` in training/stages.py.

accelerate launch training/finetune.py --init MODEL --data packed --output_dir mine
"""

from minigpt3d.training.command import main


if __name__ == "__main__":
    main("own")
