"""The recipe of a model that knows more than furniture: captioned objects in, a small MiniGPT-3D out, on two CPU cores.

__main__.py           the complete recipe
captions.jsonl.gz     captions, questions, creators and licenses of some 3,000 free objects
captioned_objects.py  read the captions and the objects' clouds; creators.py lists where they come from
splits.py             hold packs, creators and names out; split.json has the result
nothing.py            shapes that are nothing: primitives, blobs, broken pieces
build.py              write clouds, views and texts: text.py and wordnet.py make the texts
augment.py            random variants of clouds, as scans spoil them
descriptors.py        descriptors without learning, and the scores that an encoder has to beat
encoder.py            train the 3D encoder with heads, and score it on held-out packs
language.py           train the tokenizer and the language model on the texts
qformer.py            encode the views, train the Q-Former, and put the base model together; network.py has its sizes
stages.py             train stages I to IV on the encoded views
marks.py              mark a model's answers about held-out objects, by rule
NOTES.md, STATE       experiments with their numbers; what is finished
"""
