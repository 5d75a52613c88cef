"""MiniGPT-3D for the Hugging Face Hub: a small language model that sees 3D (arXiv 2405.01413).

Importing the package registers it with transformers, so that `AutoModel`, `AutoProcessor` and `pipeline` read its
folders without `trust_remote_code`.
"""

# pytest imports a root __init__.py a second time under the checkout folder's name; only the real package runs its body.
if __name__ == "minigpt3d":
    __version__ = "0.1.0"

    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from .configuration_minigpt3d import HUB_ID, MiniGPT3DConfig, MiniGPT3DPhiConfig, MiniGPT3DPointConfig
    from .modeling_minigpt3d import MiniGPT3DForConditionalGeneration, MiniGPT3DModel, MiniGPT3DPhiModel
    from .pipeline_minigpt3d import PointCloudToTextPipeline, register
    from .point_cloud_minigpt3d import PointCloudError, load_point_cloud
    from .processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor, prepare_tokenizer

    AutoConfig.register("minigpt3d", MiniGPT3DConfig, exist_ok=True)
    AutoConfig.register("minigpt3d_phi", MiniGPT3DPhiConfig, exist_ok=True)
    AutoModel.register(MiniGPT3DConfig, MiniGPT3DModel, exist_ok=True)
    AutoModel.register(MiniGPT3DPhiConfig, MiniGPT3DPhiModel, exist_ok=True)
    AutoModelForImageTextToText.register(MiniGPT3DConfig, MiniGPT3DForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(MiniGPT3DConfig, MiniGPT3DPointCloudProcessor, exist_ok=True)
    AutoProcessor.register(MiniGPT3DConfig, MiniGPT3DProcessor, exist_ok=True)
    register()

    __all__ = [
        "HUB_ID",
        "MiniGPT3DConfig",
        "MiniGPT3DForConditionalGeneration",
        "MiniGPT3DModel",
        "MiniGPT3DPhiConfig",
        "MiniGPT3DPhiModel",
        "MiniGPT3DPointCloudProcessor",
        "MiniGPT3DPointConfig",
        "MiniGPT3DProcessor",
        "PointCloudError",
        "PointCloudToTextPipeline",
        "load_point_cloud",
        "prepare_tokenizer",
    ]
