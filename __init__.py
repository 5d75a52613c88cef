"""MiniGPT-3D for the Hugging Face Hub: a small language model that sees 3D (arXiv 2405.01413)."""

# pytest imports a root __init__.py a second time under the checkout folder's name; only the real package runs its body.
if __name__ == "minigpt3d":
    __version__ = "0.1.0"
