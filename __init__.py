"""MiniGPT-3D for the Hugging Face Hub: a small language model that sees 3D (arXiv 2405.01413).

Importing this package is cheap: a name or submodule is imported when it is used. `AutoModel`, `AutoProcessor` and
`pipeline` read folders of this model without `trust_remote_code`: its classes are registered at once if transformers is
imported already, else at the end of the import that brings it in.
"""

import sys
from importlib import import_module
from itertools import dropwhile


__version__ = "0.1.0"

# Public names and the modules that define them.
_MODULES = {
    "HUB_ID": "configuration_minigpt3d",
    "MiniGPT3DConfig": "configuration_minigpt3d",
    "MiniGPT3DPhiConfig": "configuration_minigpt3d",
    "MiniGPT3DPointConfig": "configuration_minigpt3d",
    "MiniGPT3DForConditionalGeneration": "modeling_minigpt3d",
    "MiniGPT3DModel": "modeling_minigpt3d",
    "MiniGPT3DPhiModel": "modeling_minigpt3d",
    "MiniGPT3DPointCloudProcessor": "processing_minigpt3d",
    "MiniGPT3DProcessor": "processing_minigpt3d",
    "prepare_tokenizer": "processing_minigpt3d",
    "MiniGPT3DCollator": "data.collator",
    "PointCloudToTextPipeline": "pipeline_minigpt3d",
    "ZeroShotPointCloudClassificationPipeline": "evaluation.zero_shot",
    "PointCloudError": "point_cloud_minigpt3d",
    "ReadingLimits": "point_cloud_minigpt3d",
    "load_point_cloud": "point_cloud_minigpt3d",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register():
    """Tell transformers' Auto classes and pipelines about the classes here. Doing it twice does no harm."""
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from . import configuration_minigpt3d, modeling_minigpt3d, pipeline_minigpt3d, processing_minigpt3d

    config, phi_config = configuration_minigpt3d.MiniGPT3DConfig, configuration_minigpt3d.MiniGPT3DPhiConfig
    conditional_generation = modeling_minigpt3d.MiniGPT3DForConditionalGeneration
    AutoConfig.register("minigpt3d", config, exist_ok=True)
    AutoConfig.register("minigpt3d_phi", phi_config, exist_ok=True)
    AutoModel.register(config, modeling_minigpt3d.MiniGPT3DModel, exist_ok=True)
    AutoModel.register(phi_config, modeling_minigpt3d.MiniGPT3DPhiModel, exist_ok=True)
    AutoModelForImageTextToText.register(config, conditional_generation, exist_ok=True)
    AutoModelForMultimodalLM.register(config, conditional_generation, exist_ok=True)
    AutoFeatureExtractor.register(config, processing_minigpt3d.MiniGPT3DPointCloudProcessor, exist_ok=True)
    AutoProcessor.register(config, processing_minigpt3d.MiniGPT3DProcessor, exist_ok=True)
    pipeline_minigpt3d.register()
    import_module(".evaluation.zero_shot", __name__).register()


class _RegisterAfterImport:
    """Import hook: registers as soon as transformers is imported.

    A module of this package that imports transformers is incomplete until its own import ends, and cannot be registered
    before. So whichever import of `names` ends last registers, in whatever thread.
    """

    names = {"transformers", *(f"{__name__}.{module}" for module in _MODULES.values())}
    running: set[str] = set()  # imports that have begun and not ended

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        if name not in cls.names:
            return None
        later_finders = list(dropwhile(lambda finder: finder is not cls, sys.meta_path))[1:]
        specs = (finder.find_spec(name, path, target) for finder in later_finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            cls.running.add(name)
            try:
                execute(module)
            finally:
                cls.running.discard(name)
            if not cls.running and "transformers" in sys.modules and cls in sys.meta_path:
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not cls]
                _register()

        spec.loader.exec_module = execute_and_register
        return spec


# pytest imports a root __init__.py once more, under the name of the checkout's folder: only the package registers.
if __name__ == "minigpt3d":
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport)
