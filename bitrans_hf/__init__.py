"""Image-level labels in, segmentation masks out: the Bi-Trans method on the Hugging Face stack."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .configuration_bitrans import BiTransConfig
from .image_processing_bitrans import BiTransImageProcessor
from .modeling_bitrans import BiTransModel, BiTransOutput
from .seeds import Seeds, extract_seeds

__version__ = "0.1.0"

# With the package imported, the Auto classes know its models without trust_remote_code.
AutoConfig.register("bitrans", BiTransConfig)
AutoModel.register(BiTransConfig, BiTransModel)
AutoModelForImageClassification.register(BiTransConfig, BiTransModel)
AutoImageProcessor.register(BiTransConfig, image_processor_classes={"torchvision": BiTransImageProcessor})

__all__ = ["BiTransConfig", "BiTransImageProcessor", "BiTransModel", "BiTransOutput", "Seeds", "extract_seeds"]
