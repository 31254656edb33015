"""Image-level labels in, segmentation masks out: the Bi-Trans method on the Hugging Face stack.

Every public name is importable from here and loaded when it is first used: `import bitrans_hf` alone imports neither
torch nor transformers.
"""

from typing import TYPE_CHECKING

from .auto_classes import register_in_time
from .lazy import lazy_names

if TYPE_CHECKING:
    from .data.coco import load_coco
    from .data.common import DataError, UnreadableImageError
    from .data.folder import load_folder
    from .data.folder_report import FolderReport, check_folder
    from .data.shapes import make_shapes
    from .data.voc import load_voc
    from .hub.configuration_affinitynet import AffinityNetConfig
    from .hub.configuration_bitrans import BiTransConfig
    from .hub.configuration_cam import CamConfig
    from .hub.configuration_deeplab import DeepLabConfig
    from .hub.errors import InputError
    from .hub.image_processing_bitrans import BiTransImageProcessor
    from .hub.modeling_affinitynet import AffinityNetModel, AffinityNetOutput
    from .hub.modeling_bitrans import BiTransModel, BiTransOutput
    from .hub.modeling_cam import CamModel, CamOutput
    from .hub.modeling_deeplab import DeepLabForSemanticSegmentation
    from .hub.pipeline_bitrans import PseudoMaskPipeline
    from .hub.seeds import Seeds, extract_seeds
    from .metrics.mean_iou.mean_iou import MeanIoU
    from .metrics.sweep import threshold_sweep
    from .refine.crf import dense_crf
    from .refine.random_walk import propagate
    from .weights import from_mctformer, from_timm, from_timm_state_dict

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AffinityNetConfig": "hub.configuration_affinitynet",
        "AffinityNetModel": "hub.modeling_affinitynet",
        "AffinityNetOutput": "hub.modeling_affinitynet",
        "BiTransConfig": "hub.configuration_bitrans",
        "BiTransImageProcessor": "hub.image_processing_bitrans",
        "BiTransModel": "hub.modeling_bitrans",
        "BiTransOutput": "hub.modeling_bitrans",
        "CamConfig": "hub.configuration_cam",
        "CamModel": "hub.modeling_cam",
        "CamOutput": "hub.modeling_cam",
        "DataError": "data.common",
        "DeepLabConfig": "hub.configuration_deeplab",
        "DeepLabForSemanticSegmentation": "hub.modeling_deeplab",
        "FolderReport": "data.folder_report",
        "InputError": "hub.errors",
        "MeanIoU": "metrics.mean_iou.mean_iou",
        "PseudoMaskPipeline": "hub.pipeline_bitrans",
        "Seeds": "hub.seeds",
        "UnreadableImageError": "data.common",
        "check_folder": "data.folder_report",
        "dense_crf": "refine.crf",
        "extract_seeds": "hub.seeds",
        "from_mctformer": "weights",
        "from_timm": "weights",
        "from_timm_state_dict": "weights",
        "load_coco": "data.coco",
        "load_folder": "data.folder",
        "load_voc": "data.voc",
        "make_shapes": "data.shapes",
        "propagate": "refine.random_walk",
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
