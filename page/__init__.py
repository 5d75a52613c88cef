"""The page of `minigpt3d demo`: an object in 3D beside a chat about it.

shown.py         files that people drop → the cloud that the model sees, and what they are told about it
surface.py       the surface of a mesh as a GLB, to look at
streaming.py     streamed answers about an object
content.py       what the browser is sent: JSON for the 3D view, texts as HTML
actions.py       what happens when something is clicked, dropped or chosen
layout.py        the layout of the page, and the server that shows it
space.py         a folder that is a Space of the Hub with this page
viewer/          the 3D view in the browser; `make viewer` bundles it with three.js into static/viewer.js
"""
