"""Statistics of comparisons: effects with intervals first, p values second, n with each."""

from ildistil.study.statistics.compare import Comparison, compare
from ildistil.study.statistics.counted import F1, CountedMetric, accuracy, matthews, mean, pearson, resampled, spearman
from ildistil.study.statistics.family import Adjusted, holm
from ildistil.study.statistics.friedman import Friedman, friedman
from ildistil.study.statistics.models import McNemar, OverRows, mcnemar, over_rows
from ildistil.study.statistics.paired_tests import PairedTest, sign_flip, smallest_p, wilcoxon
from ildistil.study.statistics.pairs import Pairs, pair
from ildistil.study.statistics.ranks import Ranking, ranks
from ildistil.study.statistics.sensitivity import (
    Sensitivity,
    SensitivityDifference,
    compare_sensitivity,
    sensitivity,
)
from ildistil.study.statistics.summary import Estimate, Proportion, Summary, proportion, summarise

__all__ = [
    "F1",
    "Adjusted",
    "Comparison",
    "CountedMetric",
    "Estimate",
    "Friedman",
    "McNemar",
    "OverRows",
    "PairedTest",
    "Pairs",
    "Proportion",
    "Ranking",
    "Sensitivity",
    "SensitivityDifference",
    "Summary",
    "accuracy",
    "compare",
    "compare_sensitivity",
    "friedman",
    "holm",
    "matthews",
    "mcnemar",
    "mean",
    "over_rows",
    "pair",
    "pearson",
    "proportion",
    "ranks",
    "resampled",
    "sensitivity",
    "sign_flip",
    "smallest_p",
    "spearman",
    "summarise",
    "wilcoxon",
]
