"""The recipe of the checkpoint that ships: furniture libraries in, a small MiniGPT-3D out, on two CPU cores.

`kinds.py` and `colors.py` say what counts as a right answer, `library.py` reads `.sh3f` libraries, `captions.py` writes
what is said about an object, `build_data.py` makes the data release, `pretrain.py` trains what the paper takes
ready-made, `training/stage1.py` to `stage4.py` do the rest, `evaluate.py` scores, and `run.py` is the whole recipe.
"""
