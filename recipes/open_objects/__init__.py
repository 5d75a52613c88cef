"""The recipe of a model that knows more than furniture: captioned objects in, a small MiniGPT-3D out, on two CPU cores.

captions.jsonl.gz  captions, questions, creators and licenses of some 3,000 free objects
objects.py         read the captions and the objects' clouds
split.py           hold packs, creators and names out
nothing.py         shapes that are nothing: primitives, blobs, broken pieces
build_data.py      write clouds, splits and texts: text.py and wordnet.py make the texts
augment.py         random variants of clouds, as scans spoil them
encoder.py         train the 3D encoder with heads, and score it on held-out packs
language.py        train the tokenizer and the language model on the texts
NOTES.md, STATE    experiments with their numbers; what is finished
"""
