"""Registers our models with transformers' Auto classes and `pipeline` once both libraries are imported, in any order.

Registering imports transformers, torch and our networks, which takes seconds, so `import bitrans_hf` alone does not do
it. `register_in_time` waits until something loads transformers' `AutoConfig`, which all Auto classes and pipelines
use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_LIBRARIES = ("transformers", "bitrans_hf")
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_in_time() -> None:
    """Register now if `AutoConfig` is loaded; otherwise right after the import that loads it."""
    sys.meta_path.insert(0, watcher := _ImportWatcher())
    watcher.register_if_due()


def register() -> None:
    """Register the models and the task with the Auto classes and `pipeline`: no trust_remote_code is needed then."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForSemanticSegmentation,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from .hub.configuration_affinitynet import AffinityNetConfig
    from .hub.configuration_bitrans import BiTransConfig
    from .hub.configuration_cam import CamConfig
    from .hub.configuration_deeplab import DeepLabConfig
    from .hub.image_processing_bitrans import BiTransImageProcessor
    from .hub.modeling_affinitynet import AffinityNetModel
    from .hub.modeling_bitrans import BiTransModel
    from .hub.modeling_cam import CamModel
    from .hub.modeling_deeplab import DeepLabForSemanticSegmentation
    from .hub.pipeline_bitrans import TASK, PseudoMaskPipeline

    AutoConfig.register("bitrans", BiTransConfig)
    AutoModel.register(BiTransConfig, BiTransModel)
    AutoModelForImageClassification.register(BiTransConfig, BiTransModel)
    AutoImageProcessor.register(BiTransConfig, image_processor_classes={"torchvision": BiTransImageProcessor})
    PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=PseudoMaskPipeline, pt_model=AutoModel, type="image")

    AutoConfig.register("affinitynet", AffinityNetConfig)
    AutoModel.register(AffinityNetConfig, AffinityNetModel)
    AutoConfig.register("bitrans-cam", CamConfig)
    AutoModel.register(CamConfig, CamModel)
    AutoConfig.register("bitrans-deeplab", DeepLabConfig)
    AutoModelForSemanticSegmentation.register(DeepLabConfig, DeepLabForSemanticSegmentation)
    AutoImageProcessor.register(DeepLabConfig, image_processor_classes={"torchvision": BiTransImageProcessor})


class _ImportWatcher(MetaPathFinder):
    """Detects that `AutoConfig` is loaded and no module of transformers or ours is partially imported."""

    def __init__(self) -> None:
        self.under_way = 0  # imports of the two libraries, one inside the other

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of the two libraries as usual, and make its loader report when it is finished."""
        if fullname.partition(".")[0] not in _LIBRARIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.under_way += 1
            try:
                execute(module)
            finally:
                self.under_way -= 1
            self.register_if_due()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def register_if_due(self) -> None:
        """Register once, if possible now."""
        if not self.under_way and _AUTO_CONFIG in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()
