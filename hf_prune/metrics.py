"""The measures as `evaluate.Metric`s, computed in memory and without the Hub. Importing this file takes seconds."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

INTEGER, REAL = datasets.Value("int64"), datasets.Value("float64")


def _about(description: str, inputs: str, features: dict[str, Any]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=datasets.Features(features)
    )


class TopK(evaluate.Metric):
    """Share of images whose class is among the k highest logits. `predictions`: class numbers, best first."""

    def _info(self) -> evaluate.MetricInfo:
        return _about(
            "Top-k accuracy: the share of images whose class is among the k highest logits.",
            "predictions: the classes of the highest logits, best first; references: the true class; k.",
            {"predictions": datasets.Sequence(INTEGER), "references": INTEGER},
        )

    def _compute(self, predictions: Any, references: Any, k: int = 1) -> dict[str, float]:
        best = np.asarray(predictions)[:, :k]  # (n, k)
        return {f"top{k}": float((best == np.asarray(references)[:, None]).any(axis=1).mean())}


class Agreement(evaluate.Metric):
    """Share of images on which two models prefer the same class. No label is needed."""

    def _info(self) -> evaluate.MetricInfo:
        return _about(
            "Agreement: the share of images on which the pruned and the dense model have the same best class.",
            "predictions: best class of the pruned model; references: best class of the dense model.",
            {"predictions": INTEGER, "references": INTEGER},
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"agreement": float((np.asarray(predictions) == np.asarray(references)).mean())}


class RelativeError(evaluate.Metric):
    """||Z - Z_d||^2 / ||Z_d||^2 over all images: 0 for an unchanged model, about 1 for one that answers 0."""

    def _info(self) -> evaluate.MetricInfo:
        return _about(
            "Relative error of the outputs Z (n, classes) against the dense model's: ||Z - Z_d||^2 / ||Z_d||^2.",
            "predictions: ||z - z_d||^2 of each image; references: ||z_d||^2 of each image.",
            {"predictions": REAL, "references": REAL},
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"relative_error": float(np.sum(predictions) / np.sum(references))}


class CalibrationError(evaluate.Metric):
    """Expected calibration error (Guo et al. 2017, eq. 3): |share right - mean confidence|, averaged over 15 bins."""

    def _info(self) -> evaluate.MetricInfo:
        return _about(
            "Expected calibration error: the gap between the confidence and the accuracy of the first answer, averaged "
            "over equally wide bins of the confidence, weighed by their images. Few images make it larger.",
            "predictions: the softmax of the best logit; references: whether that answer is right; bins.",
            {"predictions": REAL, "references": INTEGER},
        )

    def _compute(self, predictions: Any, references: Any, bins: int = 15) -> dict[str, float]:
        sure, right = np.asarray(predictions), np.asarray(references)
        place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # bins are (low, high], as in the paper
        gap = np.abs(np.bincount(place, sure, bins) - np.bincount(place, right, bins))
        return {"ece": float(gap.sum() / len(sure))}


def compute(metric: type[evaluate.Metric], predictions: Any, references: Any, **options: Any) -> float:
    """The one number of a metric, without files in the cache and without locks."""
    found = metric(keep_in_memory=True).compute(predictions=predictions, references=references, **options)
    (value,) = found.values()
    return float(value)
