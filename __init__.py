"""MiniGPT-3D for the Hugging Face Hub: a small language model that sees 3D (arXiv 2405.01413).

Importing this package is cheap: a name or submodule is imported when it is used. Its classes are registered with
transformers, so that `AutoModel`, `AutoProcessor` and `pipeline` read its folders without `trust_remote_code`, as soon
as transformers is there: at once if it is imported already, else at the end of the import that brings it in.
"""

# pytest imports a root __init__.py a second time under the checkout folder's name; only the real package runs its body.
if __name__ == "minigpt3d":
    import sys
    from importlib import import_module
    from importlib.machinery import PathFinder

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
        "PointCloudToTextPipeline": "pipeline_minigpt3d",
        "PointCloudError": "point_cloud_minigpt3d",
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
        from transformers import (
            AutoConfig,
            AutoFeatureExtractor,
            AutoModel,
            AutoModelForImageTextToText,
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
        AutoFeatureExtractor.register(config, processing_minigpt3d.MiniGPT3DPointCloudProcessor, exist_ok=True)
        AutoProcessor.register(config, processing_minigpt3d.MiniGPT3DProcessor, exist_ok=True)
        pipeline_minigpt3d.register()

    class _RegisterAfterImport:
        """Finds transformers and the modules here that need it, and registers when the outermost of them is imported.

        Not earlier: a module of ours that brings transformers in is not there to be registered before its own end.
        """

        names = {"transformers", *(f"{__name__}.{module}" for module in _MODULES.values())}
        depth = 0

        @classmethod
        def find_spec(cls, name: str, path=None, target=None):
            spec = PathFinder.find_spec(name, path) if name in cls.names else None
            if spec is None or spec.loader is None:
                return None
            execute = spec.loader.exec_module

            def execute_and_register(module):
                cls.depth += 1
                try:
                    execute(module)
                finally:
                    cls.depth -= 1
                if cls.depth == 0 and "transformers" in sys.modules and cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                    _register()

            spec.loader.exec_module = execute_and_register
            return spec

    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport)
