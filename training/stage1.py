"""Stage I. `accelerate launch training/stage1.py --help` says what it trains and what it needs."""

from minigpt3d.training.train import main


if __name__ == "__main__":
    main("I")
