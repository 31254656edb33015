"""The terms of the paper's total loss (Eq. 12), one pure function each. Every term is a scalar in float32."""

import torch
import torch.nn.functional as F


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Multi-label soft margin loss (Eq. 5 with the minus sign that the paper lost).

    Args:
        logits: (B, C), any range.
        labels: (B, C) multi-hot, 0 or 1.

    Returns:
        Mean over classes, then over the batch.
    """
    return F.multilabel_soft_margin_loss(logits.float(), labels.float())


def class_consistency_loss(
    sc_cam: torch.Tensor, sc_cam_second: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Class-specific consistency, SCC (Eq. 3): L1 distance of the two views' SC-CAMs.

    Each class map is a part of a softmax row, so its sum is at most 1 and each class term lies in [0, 2] whatever
    the number of patches.

    Args:
        sc_cam: M (B, C, h, w), first view.
        sc_cam_second: f^-1(M') (B, C, h, w), second view put back into the first one's order.
        labels: None to average over all C classes (the paper); (B, C) multi-hot to average over the classes that are
            present in each image.

    Returns:
        Sum over patches, mean over classes, mean over the batch. An image without any present class adds 0.
    """
    per_class = (sc_cam.float() - sc_cam_second.float()).abs().sum(dim=(2, 3))
    if labels is None:
        return per_class.mean()
    present = labels.float()
    return ((per_class * present).sum(1) / present.sum(1).clamp(min=1)).mean()


def affinity_consistency_loss(affinity: torch.Tensor, affinity_second: torch.Tensor) -> torch.Tensor:
    """Pair-wise affinity consistency, PAC (Eq. 11): L1 distance of the two views' patch affinities.

    The paper gives no normalisation. Rows are parts of probability distributions, so: sum over keys, mean over
    queries and batch, which lies in [0, 2] for any grid. It is the literal sum over entries divided by N.

    Args:
        affinity: A (B, N, N), first view.
        affinity_second: f^-1(A') (B, N, N), rows and columns in the first view's order.
    """
    return (affinity.float() - affinity_second.float()).abs().sum(dim=2).mean()
