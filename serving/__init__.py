"""Serve a model over HTTP with OpenAI's chat completions: `minigpt3d serve`.

A request passes guard.py (key, number, size, time, departure), app.py (routes), conversation.py (messages and files), engine.py (tokens and
clouds), batching.py (requests that arrive together) and generation.py (one batch on the model).
"""
