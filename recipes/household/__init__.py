"""The recipe of the bundled checkpoint: furniture libraries in, a small MiniGPT-3D out, on two CPU cores.

    __main__.py      the complete recipe
    library.py       read Sweet Home 3D's `.sh3f` libraries
    build_data.py    write the data release: captions.py writes the texts, split.py holds objects out
    heldout.py       write the held-out objects as one file
    pretrain.py      train encoder, Q-Former and language model, which the paper takes ready-made;
                     views.py and procedural.py make its samples
    stage_scores.py  score the stages and the checkpoint
    recipe_card.py   write the texts and counts of its model card
    ablate/          train and score variants of the recipe

`evaluation/vocabulary` defines which names of kinds and colors are right answers.
"""
