"""Image-level labels in, segmentation masks out: the Bi-Trans method on the Hugging Face stack."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_affinitynet import AffinityNetConfig
from .configuration_bitrans import BiTransConfig
from .configuration_cam import CamConfig
from .configuration_deeplab import DeepLabConfig
from .image_processing_bitrans import BiTransImageProcessor
from .modeling_affinitynet import AffinityNetModel, AffinityNetOutput
from .modeling_bitrans import BiTransModel, BiTransOutput
from .modeling_cam import CamModel, CamOutput
from .modeling_deeplab import DeepLabForSemanticSegmentation
from .pipeline_bitrans import TASK, PseudoMaskPipeline
from .seeds import Seeds, extract_seeds

__version__ = "0.1.0"

# With the package imported, the Auto classes and `pipeline` know its models and its task without trust_remote_code.
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

# Saved folders carry their code, so that they open where this package is not installed, with trust_remote_code.
BiTransConfig.register_for_auto_class()
BiTransModel.register_for_auto_class()
BiTransImageProcessor.register_for_auto_class()
AffinityNetConfig.register_for_auto_class()
AffinityNetModel.register_for_auto_class()
DeepLabConfig.register_for_auto_class()
DeepLabForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "AffinityNetConfig",
    "AffinityNetModel",
    "AffinityNetOutput",
    "BiTransConfig",
    "BiTransImageProcessor",
    "BiTransModel",
    "BiTransOutput",
    "CamConfig",
    "CamModel",
    "CamOutput",
    "DeepLabConfig",
    "DeepLabForSemanticSegmentation",
    "PseudoMaskPipeline",
    "Seeds",
    "extract_seeds",
]
