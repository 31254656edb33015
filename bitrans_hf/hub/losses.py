"""The terms of the paper's total loss (Eq. 12), one pure function each. Every term is a scalar in float32."""

from collections.abc import Sequence

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


def class_consistency_loss(sc_cam: torch.Tensor, sc_cam_second: torch.Tensor) -> torch.Tensor:
    """Class-specific consistency, SCC (Eq. 3): L1 distance of the two views' SC-CAMs.

    Each class map is a part of a softmax row, so its sum is at most 1 and each class term lies in [0, 2] whatever
    the number of patches.

    Args:
        sc_cam: M (B, C, h, w), first view, at least 0.
        sc_cam_second: f^-1(M') (B, C, h, w), second view put back into the first one's order.

    Returns:
        Sum over patches, mean over all C classes, mean over the batch.
    """
    return (sc_cam.float() - sc_cam_second.float()).abs().sum(dim=(2, 3)).mean()


def affinity_consistency_loss(affinity: torch.Tensor, affinity_second: torch.Tensor) -> torch.Tensor:
    """Pair-wise affinity consistency, PAC (Eq. 11): L1 distance of the two views' patch affinities.

    The paper gives no normalization. Rows are parts of probability distributions, so: sum over keys, mean over
    queries and batch, which lies in [0, 2] for any grid. It is the literal sum over entries divided by N.

    Args:
        affinity: A (B, N, N), first view.
        affinity_second: f^-1(A') (B, N, N), rows and columns in the first view's order.
    """
    return (affinity.float() - affinity_second.float()).abs().sum(dim=2).mean()


def class_contrast_loss(class_tokens: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Contrastive class tokens of MCTformer+ (Xu et al., TPAMI 2024): in each layer, each resembles itself alone.

    Args:
        class_tokens: For each layer the class tokens (B, C, D) after it.
        labels: (B, C) multi-hot, 0 or 1.

    Returns:
        Cross-entropy of the tokens' cosine similarities (C, C) against the identity, mean over the present classes of
        an image, over layers and over the batch. An image without any present class adds 0.
    """
    tokens = F.normalize(torch.stack(list(class_tokens)).float(), dim=-1)
    own = (tokens @ tokens.transpose(-1, -2)).log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1)
    present = labels.float()
    of_image = -(own.mean(dim=0) * present).sum(1) / present.sum(1).clamp(min=1)
    return of_image.mean()
