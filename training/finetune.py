"""One's own objects: a finished model learns what `minigpt3d pack --from` has packed.

accelerate launch training/finetune.py --init org/minigpt3d --data packed --output_dir mine
"""

from .loop import main


if __name__ == "__main__":
    main("own")
