"""Image-level labels in, segmentation masks out: the Bi-Trans method on the Hugging Face stack.

Every public name is importable from here and loaded when it is first used: `import bitrans_hf` alone imports neither
torch nor transformers.
"""

from typing import TYPE_CHECKING

from .auto_classes import register_in_time
from .lazy import lazy_names

if TYPE_CHECKING:
    from .configuration_affinitynet import AffinityNetConfig
    from .configuration_bitrans import BiTransConfig
    from .configuration_cam import CamConfig
    from .configuration_deeplab import DeepLabConfig
    from .crf import dense_crf
    from .data.coco import load_coco
    from .data.common import DataError, UnreadableImageError
    from .data.folder import load_folder
    from .data.folder_report import FolderReport, check_folder
    from .data.shapes import make_shapes
    from .data.voc import load_voc
    from .errors import InputError
    from .image_processing_bitrans import BiTransImageProcessor
    from .metrics.mean_iou.mean_iou import MeanIoU
    from .metrics.sweep import threshold_sweep
    from .modeling_affinitynet import AffinityNetModel, AffinityNetOutput
    from .modeling_bitrans import BiTransModel, BiTransOutput
    from .modeling_cam import CamModel, CamOutput
    from .modeling_deeplab import DeepLabForSemanticSegmentation
    from .pipeline_bitrans import PseudoMaskPipeline
    from .random_walk import propagate
    from .seeds import Seeds, extract_seeds
    from .weights import from_mctformer, from_timm, from_timm_state_dict

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AffinityNetConfig": "configuration_affinitynet",
        "AffinityNetModel": "modeling_affinitynet",
        "AffinityNetOutput": "modeling_affinitynet",
        "BiTransConfig": "configuration_bitrans",
        "BiTransImageProcessor": "image_processing_bitrans",
        "BiTransModel": "modeling_bitrans",
        "BiTransOutput": "modeling_bitrans",
        "CamConfig": "configuration_cam",
        "CamModel": "modeling_cam",
        "CamOutput": "modeling_cam",
        "DataError": "data.common",
        "DeepLabConfig": "configuration_deeplab",
        "DeepLabForSemanticSegmentation": "modeling_deeplab",
        "FolderReport": "data.folder_report",
        "InputError": "errors",
        "MeanIoU": "metrics.mean_iou.mean_iou",
        "PseudoMaskPipeline": "pipeline_bitrans",
        "Seeds": "seeds",
        "UnreadableImageError": "data.common",
        "check_folder": "data.folder_report",
        "dense_crf": "crf",
        "extract_seeds": "seeds",
        "from_mctformer": "weights",
        "from_timm": "weights",
        "from_timm_state_dict": "weights",
        "load_coco": "data.coco",
        "load_folder": "data.folder",
        "load_voc": "data.voc",
        "make_shapes": "data.shapes",
        "propagate": "random_walk",
        "threshold_sweep": "metrics.sweep",
    },
)

register_in_time()

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
    "DataError",
    "DeepLabConfig",
    "DeepLabForSemanticSegmentation",
    "FolderReport",
    "InputError",
    "MeanIoU",
    "PseudoMaskPipeline",
    "Seeds",
    "UnreadableImageError",
    "check_folder",
    "dense_crf",
    "extract_seeds",
    "from_mctformer",
    "from_timm",
    "from_timm_state_dict",
    "load_coco",
    "load_folder",
    "load_voc",
    "make_shapes",
    "propagate",
    "threshold_sweep",
]
