"""Stage IV: eight query experts part ways while a router learns to choose among them.

accelerate launch training/stage4.py --init stage3 --data packed --output_dir stage4
"""

from .loop import main


if __name__ == "__main__":
    main("IV")
