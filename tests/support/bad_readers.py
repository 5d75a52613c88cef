"""Readers that fail as libraries do, by the name of the file; other files are read as usual."""

import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from minigpt3d.data import clouds
from minigpt3d.point_cloud_minigpt3d import load_orientations as load_all, load_point_cloud as load


def misbehave(path):
    name = Path(path).stem if isinstance(path, (str, os.PathLike)) else None  # the pipeline passes arrays
    if name == "sleeps":
        tempfile.mkstemp()  # as downloads and archives do
        time.sleep(1000)
    elif name == "loops":  # in C, holding Python's lock
        re.match(r"(a+)+$", "a" * 60 + "b")
    elif name == "allocates":
        blocks = []
        while True:
            blocks.append(bytearray(b"x") * (64 * 1024**2))
    elif name == "aborts":
        os.abort()
    elif name == "exits":
        os._exit(0)
    elif name == "raises":
        raise KeyboardInterrupt
    elif name == "talks":
        warnings.warn("a warning for users", UserWarning, stacklevel=1)
        warnings.warn("a warning for users", UserWarning, stacklevel=1)
        warnings.warn("one for developers", DeprecationWarning, stacklevel=1)
        print("log", file=sys.stderr, flush=True)
        print("log", flush=True)
        subprocess.run("echo log; echo log >&2; cat", shell=True, check=True)


def load_orientations(path, *args, **kwargs):
    misbehave(path)
    return load_all(path, *args, **kwargs)


def load_point_cloud(path, *args, **kwargs):
    misbehave(path)
    return load(path, *args, **kwargs)


def load_encoded(path, *args, **kwargs):
    misbehave(path)
    return clouds.load_encoded(path, *args, **kwargs)
